"""Figures that nobody looks at: drawing takes most of the time of a small run."""

import base64
import contextlib
import functools

PIXEL = base64.b64decode(  # a PNG of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


class Blank:
    """In place of axes, and of the lines, images and texts in them: whatever is asked of it is another one."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args, **options):
        return self

    def __iter__(self):  # (line,) = axes.plot(...)
        return iter([self])

    def __getitem__(self, key):
        return self

    def get_xlim(self):
        return 0.0, 1.0

    get_ylim = get_xlim

    def get_legend_handles_labels(self):
        return [], []


def make_blank(figure, *args, **options):
    return Blank()


def save_blank(figure, file, **options):
    with contextlib.nullcontext(file) if hasattr(file, "write") else open(file, "wb") as stream:
        stream.write(PIXEL)


IN_PLACE = {"savefig": save_blank} | dict.fromkeys(
    ["add_subplot", "add_axes", "colorbar", "legend", "suptitle"], make_blank
)


class Method:
    """A method of a figure, which is another one unless `is_drawn()`."""

    def __init__(self, method, other, is_drawn):
        self.method = method
        self.other = other
        self.is_drawn = is_drawn

    def __get__(self, figure, kind=None):
        if figure is None:  # pyplot, when it is imported, copies the documentation
            return self.method
        return functools.partial(self.method if self.is_drawn() else self.other, figure)


def install(is_drawn):
    """Make matplotlib's figures blank, unless `is_drawn()`."""
    from matplotlib.figure import Figure

    for name, other in IN_PLACE.items():
        setattr(Figure, name, Method(getattr(Figure, name), other, is_drawn))
