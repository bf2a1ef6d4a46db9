"""From files of preferences to packed rows."""
