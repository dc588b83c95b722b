"""A generation from beginning to end: which layers it has, and what an image's infotext says of us."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping

from .. import memory
from ..console import say
from ..engines.table import Found
from . import options, status
from .hosts import host

RETRIES = "Subquad retries"
MEASURED = "Subquad measured"  # engines and sizes that a measurement chose, and the fixed order would not have
RERUNS = "Subquad exact reruns"  # calls of which an inexact engine's result was of no use
BANDS = "Subquad VAE computed"  # in (lower) bands or on the processor: last bits differ; interrupted: it is a sketch
COMPUTED = "Subquad computed"  # all engines that computed an image for which one was set that did not do it alone
AFTERWARDS = (RETRIES, MEASURED, RERUNS, BANDS, COMPUTED)  # known only when an image is there
TOLD = "subquad_told"  # an attribute of a request: by the number of a batch, what its infotexts are to tell

_said: set[str] = set()


def begin(p) -> None:
    """At `process`, when this request's overrides are in force; and before, where the web UI tells of all requests."""
    # What was said of the image before: the cells of a grid share their parameters.
    for name in (*AFTERWARDS, *options.INFOTEXT.values()):
        p.extra_generation_params.pop(name, None)
    setattr(p, TOLD, {})
    status.begin(_images(p), host().settings().engine)
    if (vae := host().vae) is not None:
        vae.pictures.begin(p, finish_batch)
    memory.forget()  # the model may have been moved since
    host().prepare()
    if host().active:
        p.extra_generation_params.update(options.changed_from_default())


def sizes(p) -> list[tuple[int, int]]:
    """(width, height) of the images that a request makes: hires fix makes a second one of the first."""
    found = [(p.width, p.height)]
    if getattr(p, "enable_hr", False):
        width, height = p.hr_resize_x, p.hr_resize_y  # 0: by the other one, or by the scale
        found.append(
            (
                int(width or height * p.width / p.height or p.width * p.hr_scale),
                int(height or width * p.height / p.width or p.height * p.hr_scale),
            )
        )
    return list(dict.fromkeys(found))


def _images(p) -> status.Images | None:
    """The last and largest of them, for whoever looks at the tab next."""
    with contextlib.suppress(AttributeError, TypeError, ValueError, ArithmeticError):  # others fill it in as they like
        return status.Images(*map(int, (*sizes(p)[-1], p.batch_size)))
    return None


def begin_batch(p) -> None:
    """At `before_process`, so that guests find no pinned layer; at `process_batch`, after guests' own turn; and before
    every sampling, for which another model may have been loaded."""
    host().prepare()


def finish_batch(p) -> None:
    """At `postprocess_batch`, before most web UIs make infotexts: smaller chunks change an image's last bits."""
    seen = status.generation()
    if host().active and not host().interrupted():
        seen.reach = host().reach(seen.served)
    if seen.retries or seen.remembered:
        p.extra_generation_params[RETRIES] = seen.retries or "remembered"
    if seen.reruns:
        p.extra_generation_params[RERUNS] = seen.reruns
    if decoded := _how_decoded(seen):
        p.extra_generation_params[BANDS] = decoded
    if instead := status.instead(seen):
        _tell_who_computed(p, seen)
        if instead not in _said:
            _said.add(instead)
            say(f"[subquad] {instead}")
    if seen.measured:
        p.extra_generation_params[MEASURED] = "; ".join(sorted(set(map(_written, list(seen.measured)))))
    names = (*AFTERWARDS, options.INFOTEXT["engine"])
    told = {name: p.extra_generation_params[name] for name in names if name in p.extra_generation_params}
    getattr(p, TOLD, {})[getattr(p, "iteration", 0)] = told


def before_image_saved(params) -> None:
    """Some web UIs make infotexts before they decode: what they could not tell is added in the file."""
    told = getattr(params.p, TOLD, {}).get(getattr(params.p, "iteration", 0))
    if told and (infotext := params.pnginfo.get("parameters")):
        params.pnginfo["parameters"] = telling(infotext, told)


def postprocess(p, processed) -> None:
    """And on the page."""
    batches: dict[int, dict[str, object]] = getattr(p, TOLD, {})
    with contextlib.suppress(AttributeError, TypeError, ArithmeticError):  # others fill it in as they like
        first, per_batch = processed.index_of_first_image, processed.batch_size
        for index, infotext in enumerate(processed.infotexts):
            processed.infotexts[index] = telling(infotext, batches.get((index - first) // per_batch, {}))
        processed.info = telling(processed.info, batches.get(0, {}))


def telling(infotext: str, told: Mapping[str, object]) -> str:
    """The infotext with these parameters, in the place of what it says of them."""
    if not (infotext and told):
        return infotext
    before, line, parameters = infotext.rstrip().rpartition("\n")
    for name, value in told.items():
        parameters, replaced = re.subn(rf"(?<={re.escape(name)}: )[^,]*", lambda _, it=value: str(it), parameters)
        parameters += "" if replaced else f", {name}: {value}"
    return f"{before}{line}{parameters}"


def decoded_later(infotext: str | None, seen: status.Generation) -> str | None:
    """The infotext of an image that was sampled before: what is `seen` of decoding it is told as well."""
    if not infotext:
        return infotext
    told, decoded = re.sub(rf", {BANDS}: [^,\n]*", "", infotext), _how_decoded(seen)
    return telling(told, {BANDS: decoded} if decoded else {})


def _how_decoded(seen: status.Generation) -> str:
    if seen.sketched:
        return "interrupted"
    if seen.bands is None:
        return ""
    return "on the processor" if seen.on_processor else "in lower bands" if seen.lower_bands else "in bands"


def _tell_who_computed(p, seen: status.Generation) -> None:
    """The engine of an image is one that computed it, so that pasting its infotext makes the same again."""
    engines = [name for name, _ in seen.computed.most_common()]
    if seen.wanted not in engines:
        p.extra_generation_params[options.INFOTEXT["engine"]] = engines[0]
    if len(engines) > 1:
        p.extra_generation_params[COMPUTED] = "; ".join(engines)


def _written(found: Found) -> str:
    """Without a comma or a colon, for which web UIs would put it into quotes."""
    tile = f" {found.query_chunk or 'auto'}x{found.kv_chunk or 'auto'}" if found.has_tile else ""
    return found.engine + tile


def end(p) -> None:
    """After the generation, whatever became of it, where the web UI tells of all requests."""
    finish_batch(p)  # some are made without the script that would have been asked
    host().release()
