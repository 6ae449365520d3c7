"""Folders in, folders out. It knows files, no mathematics, and no model's name: classes enter its registry themselves.

config.py     JSON -> a checked, frozen config
hub.py        a Hub id or a path -> a local folder
folder.py     a folder's files -> tensors under our names
save.py       components -> a folder, whole or not at all
component.py  the base of everything that a folder holds, and the registry
"""
