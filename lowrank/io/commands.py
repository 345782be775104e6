"""Run the function of a command line: errors in one line, and an exit status."""

import os
import sys
from collections.abc import Callable

BAD_INPUT, INTERRUPTED = 2, 130
EXTRAS = {
    "transformers": "tasks",
    "datasets": "tasks",
    "timm": "tasks",
    "lm_eval": "eval",
    "gguf": "packaged",
    "onnx": "packaged",
}  # module -> extra; others: dev
MOST = 2000  # characters of an error; a message may list every name that is known


def run_command(call: Callable[[], int], *errors: type[Exception]) -> int:
    """Call a function, and print what it raises about its input in one line on stderr.

    **Arguments**

    - `call`: function without arguments that returns an exit status.
    - `errors`: kinds of errors to report in one line, beside `ValueError`, `OSError` and `ImportError`.

    **Returns** the exit status: that of `call`, or the `exit_status` of the error, 2 for one that has none; 130 after Ctrl-C.
    """
    try:
        status = call()
        sys.stdout.flush()
    except (
        BrokenPipeError
    ):  # who read the output has what it wanted; another write at the end of the process would fail, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ImportError, *errors) as error:
        extra = EXTRAS.get(getattr(error, "name", None) or "", "dev")
        hint = f": install lowrank[{extra}], as requirements.lock pins it" if isinstance(error, ImportError) else ""
        print(f"error: {' '.join(str(error).split()):.{MOST}}{hint}", file=sys.stderr)
        return getattr(error, "exit_status", BAD_INPUT)
    return status
