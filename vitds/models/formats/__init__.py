"""Ways in which weights travel: pure descriptions of names and shapes; vitds.checkpoint.exchange reads and writes by them."""

from vitds.errors import UserError
from vitds.models.formats.big_vision import BigVision
from vitds.models.formats.ours import Ours
from vitds.models.formats.outline import Outline, check_words, config_of, description, our_shapes
from vitds.models.formats.siglip import Siglip
from vitds.models.formats.timm import Timm
from vitds.models.formats.words import Conversion, Format, Part, Piece, Shapes

__all__ = [
    "FORMATS",
    "Conversion",
    "Format",
    "Outline",
    "Part",
    "Piece",
    "Shapes",
    "check_words",
    "config_of",
    "description",
    "format_of",
    "our_shapes",
]

FORMATS: dict[str, Format] = {each.name: each for each in (Ours(), BigVision(), Siglip(), Timm())}
"""Every format by name; the first that recognises the names is taken."""


def format_of(shapes: Shapes) -> Format:
    """The format of a file's names.

    Raises:
        UserError: nobody's; some of the names are given.
    """
    found = next((each for each in FORMATS.values() if each.recognise(shapes)), None)
    if found is None:
        some = ", ".join(sorted(shapes)[:4])
        raise UserError(
            f"the names of its {len(shapes)} tensors are of no format known here ({', '.join(FORMATS)}); among them: {some}"
        )
    return found
