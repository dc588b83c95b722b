"""Where things are. The extension's folder is the one that holds the demo. No `data_path`: it keeps nothing."""

import os

modules_path = os.path.dirname(os.path.abspath(__file__))
script_path = os.path.dirname(modules_path)
extension_path = os.path.dirname(script_path)
