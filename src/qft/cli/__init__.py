"""The verbs of the `qft` command: one file a verb, holding its `command`. `qft_cli` finds and loads them."""
