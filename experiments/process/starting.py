"""What a command does to its process before it imports what takes seconds."""

from convert.interrupts import exit_on_interrupt
from experiments.process.garbage import collect_seldom
from experiments.process.huge_pages import restart_with_huge_pages


def start_command() -> None:
    """Prepares the process of a command, once.

    A command module calls it under `if __name__ == "__main__"`, before its other imports: a restart
    for huge pages then costs no second import of jax, and Ctrl-C during imports needs no traceback.
    """
    exit_on_interrupt()
    restart_with_huge_pages()
    collect_seldom()
