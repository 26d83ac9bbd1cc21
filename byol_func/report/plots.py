"""Draws the pictures of a run: each function takes data and writes one PNG file.

The colours are those of Okabe and Ito, which are distinguishable with any type of colour vision. If
eight colours are not enough, marks or dashes differ, too.
"""

import os
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from byol_func.console import readable
from byol_func.runtime import atomic

COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#999999')
_MARKS = 'os^Dv'
RIGHT, WRONG = '#009E73', '#D55E00'
_MOST_IN_PANEL = 5  # Most curves with a legend inside the panel; with more, one legend below the picture.
_MOST_LETTERS = 56  # In a line of text that is as wide as a panel of curves.
_MAX_NAMED = 20  # Classes that get their own colour and name in a map.


class Curve(NamedTuple):
    """The points of one line and their standard deviation over seeds (None for one seed)."""

    label: str
    epochs: Sequence[float]
    values: Sequence[float]
    spread: Sequence[float] | None = None


class Panel(NamedTuple):
    """One pair of axes with its curves."""

    title: str
    curves: Sequence[Curve]
    is_log: bool = False


def curves(path: str | os.PathLike, panels: Sequence[Panel], title: str, values: Sequence[str] = ()) -> None:
    """Draws curves over epochs, up to three panels in a row; a band shows mean +- std.

    Every panel has at least one curve of at least two points. `values` are lines of text for metrics that were measured
    once; they get their own panel. `title` names dataset, encoder and seed.
    """
    cells = len(panels) + bool(values)
    columns = min(cells, 3)
    rows = -(-cells // columns)
    figure, axes = _subplots(rows, columns, (4.2 * columns, 2.9 * rows + 0.4))
    shared: dict[str, Any] = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        for i, curve in enumerate(panel.curves):
            color, few = COLORS[i % len(COLORS)], len(curve.epochs) < 12
            dashes = ('-', '--', ':')[i // len(COLORS) % 3]
            points = np.asarray(curve.values, float)
            axis.plot(
                curve.epochs,
                points,
                dashes,
                color=color,
                label=curve.label,
                lw=1.6,
                marker='o' if few else None,
                ms=3.5,
            )
            if curve.spread is not None:
                spread = np.asarray(curve.spread, float)
                # The band of nonnegative values ends at 0; on a logarithmic axis it ends at a tenth of the mean.
                least = 0.1 * points if panel.is_log else np.where((points >= 0).all(), 0.0, -np.inf)
                low = np.maximum(points - spread, least)
                axis.fill_between(curve.epochs, low, points + spread, color=color, alpha=0.2, lw=0)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel('epoch')
        if panel.is_log:
            axis.set_yscale('log')
        axis.grid(alpha=0.3)
        if len(panel.curves) > _MOST_IN_PANEL:
            shared |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        elif len(panel.curves) > 1:
            axis.legend(fontsize=7, framealpha=0.8)
    for axis in axes.flat[len(panels) :]:
        axis.axis('off')
    if values:
        axis = axes.flat[len(panels)]
        axis.set_title('measured once', fontsize=10)
        lines = [textwrap.fill(value, _MOST_LETTERS, subsequent_indent='    ') for value in values]
        axis.text(0.0, 0.98, _text('\n'.join(lines)), va='top', fontsize=8, transform=axis.transAxes)
    if shared:
        figure.legend(shared.values(), shared.keys(), loc='outside lower center', ncols=5, fontsize=9, frameon=False)
    _save(figure, path, title)


def embedding_map(
    path: str | os.PathLike, points: np.ndarray, labels: np.ndarray, class_names: Sequence[str], title: str
) -> None:
    """Draws points `[N, 2]` in the plane, one per image, coloured by their labels `[N]`, in 0..K-1.

    The first 20 classes get a colour, a mark and a name, the others are grey. Without names there is one colour.
    """
    figure, axes = _subplots(1, 1, (9.8, 6.4))
    axis = axes[0, 0]
    if not class_names:
        axis.scatter(*points.T, s=16, color=COLORS[0], alpha=0.75, lw=0)
        axis.set(xticks=[], yticks=[])
        return _save(figure, path, title)
    other = labels >= _MAX_NAMED
    axis.scatter(*points[other].T, s=8, color='#cccccc', label='other classes' if other.any() else None)
    for k, name in enumerate(class_names[:_MAX_NAMED]):
        mark = _MARKS[k // len(COLORS)]
        axis.scatter(
            *points[labels == k].T,
            s=16,
            marker=mark,
            color=COLORS[k % len(COLORS)],
            alpha=0.75,
            label=_short(name),
            lw=0,
        )
        if (labels == k).any():
            axis.text(
                *np.median(points[labels == k], axis=0),
                _short(name),
                fontsize=9,
                weight='bold',
                ha='center',
                va='center',
                bbox=dict(boxstyle='round,pad=0.15', fc='white', ec='none', alpha=0.7),
            )
    axis.set(xticks=[], yticks=[])
    axis.legend(loc='center left', bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, markerscale=1.5)
    _save(figure, path, title)


def confusion_matrix(path: str | os.PathLike, matrix: np.ndarray, class_names: Sequence[str], title: str) -> None:
    """Draws a confusion matrix, in percent of the true class.

    `matrix` holds counts `[K, K]`, with true classes in rows and predicted classes in columns. Names are written for up
    to 30 classes, numbers for up to 20.
    """
    num_classes = len(class_names)
    counts = np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    percent = 100.0 * matrix / counts
    side = float(np.clip(0.48 * num_classes + 2.0, 6.0, 11.0))
    figure, axes = _subplots(1, 1, (side + 0.9, side))
    axis = axes[0, 0]
    image = axis.imshow(percent, cmap='cividis', vmin=0, vmax=100)
    figure.colorbar(image, ax=axis, label='% of the true class', shrink=0.8)
    if num_classes <= 30:
        names = [_short(name) for name in class_names]
        axis.set_xticks(range(num_classes), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axis.set_yticks(range(num_classes), names)
    if num_classes <= 20:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            value = percent[row, column]
            axis.text(
                column,
                row,
                f'{value:.0f}' if value >= 0.5 else '<1',
                ha='center',
                va='center',
                fontsize=8,
                color='white' if value < 60 else 'black',
            )
    axis.set(xlabel='predicted class', ylabel='true class')
    _save(figure, path, title)


def neighbours(
    path: str | os.PathLike,
    rows: Sequence[Sequence[np.ndarray]],
    cosines: Sequence[Sequence[float]],
    row_names: Sequence[Sequence[str]] | None,
    title: str,
    files: Sequence[Sequence[str]] = (),
) -> None:
    """Draws rows of a query image and its nearest neighbours, each with its cosine to the query.

    The images are uint8 `[H, W, C]` with one or three channels. If `row_names` holds the names of their classes, frame
    and mark tell whether the classes agree. If `files` holds the paths of their files, the end of each file's name
    stands below its image.
    """
    columns = len(rows[0])
    height = (1.34 if files else 1.22) * len(rows) + 0.6
    figure, axes = _subplots(len(rows), columns, (1.05 * columns, height), layout=None)
    # Manual layout: the solver of 'constrained' takes seconds with so many axes.
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.15 / height, top=1 - 0.75 / height, wspace=0.05, hspace=0.25)
    if files:
        figure.subplots_adjust(hspace=0.38)
    for r, axes_row in enumerate(axes):
        for i, axis in enumerate(axes_row):
            image = rows[r][i]
            axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap='gray', vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
            name = _short(row_names[r][i], 10) if row_names else ''
            is_right = row_names is None or row_names[r][i] == row_names[r][0]
            sign = '' if is_right else '\N{MULTIPLICATION SIGN} '
            words = f'query {name}' if i == 0 else f'{sign}{name} {cosines[r][i]:.2f}'
            axis.set_title(words.strip(), fontsize=7, pad=3)
            color = 'black' if i == 0 or row_names is None else RIGHT if is_right else WRONG
            if files:
                axis.set_xlabel(_end_of(files[r][i], 16), fontsize=6, labelpad=2.5)
            for spine in axis.spines.values():
                spine.set(color=color, linewidth=1.0 if color == 'black' else 2.5)
    _save(figure, path, title)


ODD_PAIRS, ODD_OUTLIERS = 16, 16  # What a picture of odd images has room for: four pairs or eight outliers a row.


def odd_images(
    path: str | os.PathLike, images: Sequence[tuple[np.ndarray, str]], cosines: Sequence[float], title: str
) -> None:
    """Draws pairs of images, four in a row, and below them single images, eight in a row.

    Args:
      path: the file to write.
      images: uint8 `[H, W, C]` and the path of its file: the two of every pair one after the other, then the
        single images.
      cosines: one for every pair, then one for every single image.
      title: the title of the picture.
    """
    num_pairs = len(images) - len(cosines)
    rows = -(-num_pairs // 4), -(-(len(images) - 2 * num_pairs) // 8)
    height = 1.3 * sum(rows) + 0.7
    figure, axes = _subplots(sum(rows), 8, (9.0, height), layout=None)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.8 / height, wspace=0.12, hspace=0.3)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, axis in enumerate(axes[: rows[0]].flat):  # The two of a pair move together.
        box = axis.get_position()
        axis.set_position(box.translated(-0.005 if i % 2 else 0.005, 0.0))
    places = [*axes[: rows[0]].flat][: 2 * num_pairs] + [*axes[rows[0] :].flat][: len(images) - 2 * num_pairs]
    for i, (axis, (image, file)) in enumerate(zip(places, images, strict=True)):
        axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap='gray', vmin=0, vmax=255)
        cosine = cosines[i // 2] if i < 2 * num_pairs else cosines[i - num_pairs]
        name = _end_of(file, 12)
        axis.set_title(name if i < 2 * num_pairs and i % 2 else f'{name} {cosine:.3f}', fontsize=6.5, pad=3)
    _save(figure, path, title)


def _short(name: str, length: int = 18) -> str:
    name = _text(name)
    return name if len(name) <= length else f'{name[: length - 1]}\N{HORIZONTAL ELLIPSIS}'


def _end_of(path: str, length: int) -> str:
    """Returns the end of a file's name without its ending: the beginnings of such names are often the same."""
    name = pathlib.PurePath(path).stem
    return _text(name if len(name) <= length else f'\N{HORIZONTAL ELLIPSIS}{name[1 - length :]}')


def _text(text: str) -> str:
    return readable(text).replace('$', r'\$')  # Names are not formulas.


def _subplots(
    rows: int, columns: int, size: tuple[float, float], layout: Literal['constrained'] | None = 'constrained'
) -> tuple[Any, np.ndarray]:
    # The object interface needs no window system and leaves the global state of pyplot to the importing program.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout=layout)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: str | os.PathLike, title: str) -> None:
    figure.suptitle(_text(title), fontsize=11)
    with atomic.replacing(path, shared=True) as temporary:  # A follower may write the same file at the same time.
        figure.savefig(temporary, dpi=110, format='png')
