"""`qft backends`"""


def command() -> None:
    """List the quantizers and whether each is ready on this machine."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    import qft

    colours = {"ready": "green", "missing": "yellow", "unusable": "red"}
    table = Table("name", "state", "what it is", "what to do", header_style="bold")
    for info in qft.available_quantizers().values():
        state = f"[{colours[info.state]}]{info.state}[/]"
        table.add_row(info.name, state, escape(info.summary), escape(info.hint))
    Console().print(table)
