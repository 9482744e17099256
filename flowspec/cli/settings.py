"""Options of commands, made from the configuration's models: name, type, default and help.

A command names the settings for which it has options; their help texts stand in the models.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from flowspec.config import DeviceConfig, EngineConfig, NumericsConfig

NUMERICS = tuple(NumericsConfig.model_fields)
_FIELDS: Mapping[str, FieldInfo] = {
    **EngineConfig.model_fields,
    **NumericsConfig.model_fields,
    **DeviceConfig.model_fields,
}
_FLAGS = {"max_new_tokens": ("--max-new-tokens", "--max-tokens")}


def with_settings(*names: str, **other_help: str) -> Callable[[Callable[..., None]], Any]:
    """Give a command an option for each of these settings; its argument `settings` has them.

    `settings` maps the names of those that were given to their values. `other_help` replaces the
    help of a setting that has a narrower meaning for this command.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        listed = [one for one in own if one.name != "settings"]
        made = [_parameter(name, other_help.get(name)) for name in names]

        @functools.wraps(command)
        def with_options(**given: Any) -> None:
            settings = {name: given.pop(name) for name in names}
            command(**given, settings={k: v for k, v in settings.items() if v is not None})

        del with_options.__wrapped__  # its signature lacks the options
        with_options.__signature__ = inspect.Signature([*listed, *made])  # type: ignore[attr-defined]
        with_options.__annotations__ = {one.name: one.annotation for one in (*listed, *made)}
        return with_options

    return decorate


def help_of(name: str, text: str | None = None) -> str:
    """Return the help of a setting, the model's or `text`, with a default that is not empty."""
    field = _FIELDS[name]
    text = text or field.description or ""
    says = field.default not in (None, "", 0, False) and "[default" not in text
    return f"{text} [default: {field.default}]" if says else text


def _parameter(name: str, text: str | None) -> inspect.Parameter:
    kind = _plain(_FIELDS[name].annotation)
    option = typer.Option(*_FLAGS.get(name, ()), help=help_of(name, text), show_default=False)
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _plain(annotation: Any) -> Any:
    """Return `int` for `int | None`; the model checks its limits itself."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (one for one in get_args(annotation) if one is not NoneType)
    return annotation
