"""What all tests start from: signals as a shell in the foreground hands them to a command."""

import signal


def pytest_configure() -> None:
    """Whoever runs the tests in the background may have them ignore signals, and what they start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
