"""Devices and processes: the mesh, array shardings, agreement between hosts, and figures of accelerator chips."""
