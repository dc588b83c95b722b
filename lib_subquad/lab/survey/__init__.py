"""What a device report tells: the machine (`facts`), every engine's reasons (`reasons`), calls that were checked."""
