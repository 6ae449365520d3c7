"""Folders in, folders out. It knows files, no mathematics, and no model's name: classes enter its registry themselves.

config.py     JSON -> a checked, frozen config
hub.py        a Hub id or a path -> a local folder
arguments.py  the keywords of `from_pretrained` and `save_pretrained` that need no more than a look
folder.py     a pipeline's folder <-> its components
weights.py    a component's files of weights <-> its tensors under our names; tensors.py: one such file
save.py       a folder that holds all of the new, or is as it was
component.py  the base of everything that a folder holds, and the registry; model.py: of the networks among them
"""
