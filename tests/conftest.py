"""What all tests start from: signals as a shell in the foreground hands them to a command, and the same examples."""

import signal

from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.register_profile("other", derandomize=False, print_blob=True)
settings.load_profile("same")  # `--hypothesis-profile other` looks for examples that nobody has seen


def pytest_configure() -> None:
    """Whoever runs the tests in the background may have them ignore signals, and what they start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
