"""The command `completion`: shell completion of commands, keys and values.

The shell calls `upge __complete LINE` at each press of Tab, so this package, `words` and all that they import load
neither torch nor OmegaConf. keys.json has what only the settings classes know; `--update` writes it.
"""
