"""Where things are. The extension's folder is the one that holds the demo.

There is no `data_path`, and nothing is kept, unless somebody has given one: see `demo.host.keep_data_in`.
"""

import os

modules_path = os.path.dirname(os.path.abspath(__file__))
script_path = os.path.dirname(modules_path)
extension_path = os.path.dirname(script_path)
