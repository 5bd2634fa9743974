"""Whether a network is right as often as it claims to be."""

from typing import NamedTuple

import numpy as np

from jdistill import _validate
from jdistill.metrics._shares import correct, predicts
from jdistill.typing import ArrayLike


class Calibration(NamedTuple):
    """Fit of a network's probabilities to what happens, over `num_examples` examples.

    Attributes:
        ece: expected calibration error, in `[0, 1]`.
        nll: mean negative log-likelihood in nats.
        brier: mean squared distance of the probabilities to the one-hot label, in `[0, 2]`.
        mean_confidence: mean of the largest probability.
        num_examples: all of them.
        num_nonfinite: those among them with a logit that is not finite.
    """

    ece: float
    nll: float
    brier: float
    mean_confidence: float
    num_examples: int
    num_nonfinite: int


def calibration(logits: ArrayLike, labels: ArrayLike, *, num_bins: int = 15) -> Calibration:
    """Expected calibration error, log-likelihood, Brier score and mean confidence.

    With `B_m` the examples of bin `m`::

        ECE = Σ_m |B_m| / N · |accuracy(B_m) - confidence(B_m)|

    with the examples in `num_bins` bins of equal width by their largest probability. An example
    whose logits are not finite counts as the worst prediction there is, all probability on a wrong
    class: confidence 1, Brier score 2, infinite negative log-likelihood.

    Args:
        logits: `[N, K]` float; divide them by the temperature at which the network is tested.
        labels: `[N]` int in `0..K-1`.
        num_bins: at least 1.

    Returns:
        The measures, computed in float64.

    Raises:
        ValueError: no examples, labels outside `0..K-1`, num_bins below 1.

    Example:
        >>> sure, unsure = [4.0, 0.0], [0.0, 0.0]
        >>> result = calibration(np.array([sure, unsure]), np.array([0, 0]))
        >>> round(result.mean_confidence, 3), round(result.nll, 3), round(result.ece, 3)
        (0.741, 0.356, 0.259)

    References:
        Guo, Pleiss, Sun & Weinberger 2017, "On Calibration of Modern Neural Networks", section 2
        (15 bins); Brier 1950, "Verification of forecasts expressed in terms of probability".
    """
    from scipy import special

    _validate.count(num_bins=num_bins)
    _validate.floats(2, logits=logits)
    rows = np.asarray(logits, np.float64)
    size, num_classes = rows.shape
    if size == 0:
        raise ValueError("expected at least one example in logits, got none; pass logits [N, K]")
    _validate.class_indices(labels, batch_size=size, num_classes=num_classes)
    truth = np.asarray(labels)
    finite = predicts(rows)
    log_probs = special.log_softmax(np.where(finite[:, None], rows, 0.0), axis=1)
    probs = np.exp(log_probs)
    one_hot = np.arange(num_classes) == truth[:, None]

    right = correct(rows, truth)
    confidence = np.where(finite, probs.max(axis=1), 1.0)
    brier = np.where(finite, ((probs - one_hot) ** 2).sum(axis=1), 2.0)
    nll = np.where(finite, -log_probs[np.arange(size), truth], np.inf)

    place = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(place, weights=right - confidence, minlength=num_bins)
    return Calibration(
        ece=float(np.abs(gaps).sum() / size),
        nll=float(nll.mean()),
        brier=float(brier.mean()),
        mean_confidence=float(confidence.mean()),
        num_examples=size,
        num_nonfinite=int((~finite).sum()),
    )
