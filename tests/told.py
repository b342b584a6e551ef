"""A progress that keeps what it is told."""

from raymerge.progress import Silent


class Told(Silent):
    """messages: what was said."""

    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)
