"""``tptt-jax COMMAND``, also ``python -m experiments COMMAND``: runs any command by its name."""

import os
import sys

# The module and the description of each command.
COMMANDS = {
    "finetune": ("experiments.finetune", "Fit a memory to a model, and train it with LoRA."),
    "generate": ("experiments.generate", "Continue a text, from a prompt or a saved state."),
    "evaluate": ("experiments.evaluate", "Perplexity, recall, MMLU and lm-eval's tasks."),
    "convert": ("convert.__main__", "Import, export, push, inspect and verify models."),
    "bench": ("experiments.bench", "Speed and memory of operators, training and decoding."),
    "grid": ("experiments.grid", "Many runs of finetune, from a YAML file."),
    "state-tracking": ("experiments.state_tracking", "Which group states one layer can track."),
}


def main() -> int:
    """Starts the command with the arguments after its name."""
    try:
        return _start(sys.argv[1] if len(sys.argv) > 1 else "--help")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _start(name: str) -> int:
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        import tptt_jax

        print(tptt_jax.__version__)
        return 0
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}: {_remedy(name)}", file=sys.stderr)
        return 2
    # A new process: `python -m` prepares the process before anything is imported.
    module = COMMANDS[name][0].removesuffix(".__main__")
    # As a script it does not see the current folder, where a file may be called as a module is.
    is_script = sys.modules["__main__"].__spec__ is None
    flags = ["-P"] if is_script or sys.flags.safe_path else []
    os.execv(sys.executable, [sys.executable, *flags, "-m", module, *sys.argv[2:]])


def _remedy(name: str) -> str:
    # Imported here, so that Ctrl-C finds `main` running and prints no traceback.
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(COMMANDS)}."


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    head = "usage: tptt-jax COMMAND [OPTIONS]; tptt-jax COMMAND --help lists the options\n"
    return "\n".join([head, *lines])


if __name__ == "__main__":
    sys.exit(main())
