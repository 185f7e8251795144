"""A conversation on the terminal, with adapters that can be switched while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import PeftConfig, PeftModel
from rich.markup import escape

from reftune.controls import set_strength
from reftune.errors import ReftConfigError, ReftuneError, did_you_mean
from reftune.generate import Sampling, stream
from reftune.prompts import Message, encode_prompt
from reftune.run import Loaded, find_adapter, load_adapter, template_of
from reftune.stored import base_of
from reftune_cli.console import out

HELP = """/adapter NAME   switch to an adapter (without a name: list them)
/base           switch to the bare model
/strength X     0 the bare model, 1 as trained, -1 negated
/reset          forget the conversation
/help           this text
/quit           leave (or Ctrl-D)"""


def load_chat(
    adapters: Sequence[str], model: str | None, dtype: str
) -> tuple[Loaded, list[str], str]:
    """Load adapters on one base model; return it, their names, and the first one's template."""
    named = [named_adapter(text) for text in adapters]
    names = [name for name, _ in named]
    if len(set(names)) != len(names):
        raise ReftConfigError(f"Two adapters have the same name: {names}. Use NAME=DIRECTORY.")
    (first, path), *rest = named
    loaded = load_adapter(path, base=model, dtype=dtype, name=first)
    if not isinstance(loaded.model, PeftModel):
        raise ReftConfigError(
            f"{path!r} is trained weights of its base model, which a chat cannot switch off. "
            "Compare by: reftune generate ADAPTER PROMPT --compare"
        )
    for name, where in rest:
        found = find_adapter(where)
        base = base_of(PeftConfig.from_pretrained(str(found)))
        if model is None and base not in ("", loaded.base):
            raise ReftConfigError(
                f"{where!r} was trained on {base}, and {path!r} on {loaded.base}; adapters in one "
                "chat have one base. Name it with --model if these are the same."
            )
        loaded.model.load_adapter(str(found), name)
    return loaded, names, template_of(find_adapter(path))


class Chat:
    """The state of a conversation: its messages, and which adapter at which strength is on."""

    def __init__(
        self,
        loaded: Loaded,
        names: list[str],
        template: str,
        sampling: Sampling,
        system: str | None,
    ) -> None:
        self.loaded, self.names, self.template = loaded, names, template
        self.sampling, self.system = sampling, system
        self.active: str | None = names[0]
        self.strength = 1.0
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = [Message(role="system", content=self.system)] if self.system else []

    def loop(self) -> None:
        """Read lines and answer them until the end of input."""
        out.print(f"Adapters: {', '.join(self.names)}. /help lists the commands.")
        while True:
            try:
                line = input(f"[{self.active or 'base'}] > ").strip()
            except (EOFError, KeyboardInterrupt):
                out.print()
                return
            if line in ("/quit", "/exit"):
                return
            if line:
                self.handle(line)

    def handle(self, line: str) -> None:
        """Carry out a command, or answer a message."""
        try:
            if line.startswith("/"):
                out.print(escape(self.command(line)))
            else:
                self.answer(line)
        except ReftuneError as error:
            out.print(f"[red]{escape(str(error))}[/red]")

    def command(self, line: str) -> str:
        """Carry out a command; return what to print. Raises ReftConfigError."""
        verb, _, argument = line.partition(" ")
        argument = argument.strip()
        if verb == "/base":
            self.active = None
            return "the bare model answers now"
        if verb == "/adapter":
            if not argument:
                return f"adapters: {', '.join(self.names)}"
            if argument not in self.names:
                raise ReftConfigError(
                    f"there is no adapter {argument!r}; loaded are {', '.join(self.names)}."
                    + did_you_mean(argument, self.names)
                )
            self.active = argument
            self.loaded.model.set_adapter(argument)
            return f"{argument} answers now, at strength {self.strength:g}"
        if verb == "/strength":
            self.strength = _number(argument)
            set_strength(self.loaded.model, self.strength)
            return f"strength {self.strength:g}"
        if verb == "/reset":
            self.reset()
            return "the conversation starts anew"
        known = ["/adapter", "/base", "/strength", "/reset", "/help", "/quit"]
        return HELP if verb == "/help" else f"no command {verb}.{did_you_mean(verb, known)}\n{HELP}"

    def answer(self, text: str) -> None:
        """Print the reply to a message as it is generated; Ctrl-C ends it."""
        conversation = [*self.messages, Message(role="user", content=text)]
        chat = self.loaded.tokenizer.chat_template and self.template in ("auto", "chat")
        prompt = tuple(conversation) if chat else text
        ids = encode_prompt(prompt, self.loaded.tokenizer, self.template)  # type: ignore[arg-type]
        pieces: list[str] = []
        try:
            if self.active is None:
                with self.loaded.model.disable_adapter():
                    self._stream(ids, pieces)
            else:
                self._stream(ids, pieces)
        except KeyboardInterrupt:
            out.print(" (stopped)", end="")
        out.print()
        reply = "".join(pieces)
        self.messages = [*conversation, Message(role="assistant", content=reply)]

    def _stream(self, ids: list[int], pieces: list[str]) -> None:
        for piece in stream(self.loaded.model, self.loaded.tokenizer, ids, self.sampling):
            pieces.append(piece)
            out.print(escape(piece), end="", soft_wrap=True)


def named_adapter(text: str) -> tuple[str, str]:
    """Return the name and the path that NAME=DIRECTORY or DIRECTORY stands for."""
    name, equals, path = text.partition("=")
    if equals and not Path(text).exists():  # a directory may be called lr=0.001
        return name, path
    folder = Path(text)
    return (folder.parent.name if folder.name == "adapter" else folder.name), text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ReftConfigError(
            f"{text!r} is no number; 0 is the bare model, 1 as trained."
        ) from None
