"""Devices and processes: the mesh, where arrays lie, agreement between hosts, what a chip can do."""
