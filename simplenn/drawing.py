"""The figures of a run: losses.png and predictions.png."""

from common import run

import data


def draw_losses(rows):
    """Training, validation and, if it was measured, test loss against epochs, in one figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for part, style in (("train", "--"), ("val", "-"), ("test", ":")):
        columns = "epoch", f"{part}_loss"  # a resumed run may have lost rows of metrics.csv, or have edited ones
        points = [[row[name] for name in columns] for row in rows if row.keys() >= set(columns)]
        if points:
            axes.plot(*zip(*points), style, marker="." if len(points) < 30 else None, label=part)
    axes.set(xlabel="epoch", ylabel="loss", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return figure


def draw_outputs(dataset, outputs, columns=10):
    """Digits: the worst of the test images, with the prediction. A function: prediction and truth."""
    from matplotlib.figure import Figure

    if isinstance(dataset, data.Points):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes, order = figure.subplots(), dataset.x[:, 0].argsort().cpu()
        for values, label in ((dataset.y, "truth"), (outputs, "prediction")):
            axes.plot(dataset.x[:, 0].cpu()[order].numpy(), values[:, 0].cpu()[order].numpy(), label=label)
        axes.legend()
        return figure
    figure = Figure(figsize=(columns, 2.7), layout="constrained")
    of_truth = outputs.softmax(1).gather(1, dataset.labels[:, None])[:, 0]
    for i, axes in zip(of_truth.argsort().tolist(), figure.subplots(2, columns).flat):
        axes.imshow(dataset.images[i, 0].cpu().numpy(), cmap="gray")
        guess, truth = (run.plain_text(dataset.classes[k]) for k in (outputs[i].argmax(), dataset.labels[i]))
        if guess == truth:
            axes.set_title(guess, fontsize=8, color="green")
        else:
            axes.set_title(f"{guess} (is {truth})", fontsize=8, color="red")
    for axes in figure.axes:
        axes.axis("off")
    return figure
