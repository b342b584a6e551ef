"""Standard errors, paired tests and intervals for per-question results (NumPy and SciPy only)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# Every process imports this module, and scipy.stats takes half a second: ndtr and ndtri are the normal distribution and
# its quantiles, stdtrit Student's quantiles, bdtr the binomial distribution.
from scipy.special import bdtr, logsumexp, ndtr, ndtri, stdtrit

_CHUNK = 4_000_000  # resampled values held at once: 32 MB of float64
# Items of a bootstrap at least. Of n normal items its expanded percentiles hold the mean in 51, 74, 88 and 93 % of
# cases at n = 2, 3, 4 and 5 (for 95): means of resamples end at the least and the largest item.
_BOOTSTRAP_FROM = 8


class AccuracySummary(NamedTuple):
    """Questions, correct ones, their share and its standard error (both shares in [0, 1])."""

    n: int
    correct: int
    accuracy: float
    standard_error: float


class McNemar(NamedTuple):
    """Questions only A got right, questions only B got right, exact two-sided p."""

    only_a: int
    only_b: int
    p_value: float


class MeanInterval(NamedTuple):
    """A mean and its 95 % (by default) interval."""

    mean: float
    low: float
    high: float


class PairedDifference(NamedTuple):
    """Mean of a - b, its 95 % (by default) interval, and a two-sided p of the mean being 0."""

    difference: float
    ci_low: float
    ci_high: float
    p_value: float


def accuracy_summary(correct: ArrayLike) -> AccuracySummary:
    """Return n, correct, accuracy and standard error of one group of questions.

    Parameters
    ----------
    correct : array of bool, shape (n,)

    Notes
    -----
    The standard error is lm-evaluation-harness's `mean_stderr`: the sample standard deviation
    (ddof = 1) over sqrt(n), which for 0/1 values equals sqrt(p (1 - p) / (n - 1)). One question has
    none: NaN. At p = 0 or 1 it is 0, which understates the doubt.
    """
    correct = _vector(correct, "correct", bool)
    n, right = correct.size, int(correct.sum())
    accuracy = right / n
    error = float(np.sqrt(accuracy * (1 - accuracy) / (n - 1))) if n > 1 else float("nan")
    return AccuracySummary(n, right, accuracy, error)


def macro_summary(accuracies: ArrayLike, standard_errors: ArrayLike) -> tuple[float, float]:
    """Return the unweighted mean over subjects and its standard error, sqrt(sum se^2) / S.

    Subjects count as fixed and their errors as independent: the error is that of drawing other
    questions of the same subjects, not other subjects. A NaN among the errors makes it NaN.

    Parameters
    ----------
    accuracies, standard_errors : array of float, shape (S,)
    """
    accuracies = _vector(accuracies, "accuracies", np.float64)
    errors = _vector(standard_errors, "standard_errors", np.float64)
    if accuracies.size != errors.size:
        raise ValueError(f"{accuracies.size} accuracies but {errors.size} standard errors")
    return float(accuracies.mean()), float(np.sqrt(np.sum(errors**2)) / errors.size)


def wilson_interval(correct: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share: right answers out of n questions.

    The shares p for which the observed one is within z standard errors, with the error at p: unlike p ± z se it stays
    in [0, 1] and says something at 0 and 1 (E. B. Wilson, JASA 22, 1927).
    """
    _check_counts(np.array([correct]), np.array([n]))
    return _wilson(correct / n, n, confidence)


def macro_interval(correct: ArrayLike, n: ArrayLike, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of the unweighted mean over subjects of their accuracies.

    In place of n it uses the effective number of questions, m (1 - m) over the variance of the mean m: that many
    questions of a single kind would determine a share of m equally well. A subject's variance is that of its share
    after one more question, right with probability m, scaled up by what this takes away on average where subjects are
    alike. Its own share will not do: from few questions it says little about the variance, and from one question, or
    where all are right, nothing, while the interval of a mean of two subjects rests on both. One subject has
    `wilson_interval`. Where m is 0 or 1, which leaves no variance, the number is S^2 / sum(1 / n), that of subjects
    alike. With many questions this is the normal interval; with few it does not shrink to nothing, as that and a
    stratified bootstrap do. Subjects count as fixed.

    Parameters
    ----------
    correct, n : array of int, shape (S,)
    """
    correct, n = _vector(correct, "correct", np.int64), _vector(n, "n", np.int64)
    if correct.size != n.size:
        raise ValueError(f"{correct.size} counts of right answers but {n.size} of questions")
    _check_counts(correct, n)
    share = correct / n
    mean = float(share.mean())
    spread = mean * (1 - mean)
    drawn = (correct + mean) / (n + 1)
    lost = (1 - 1 / n.size) * n / (n + 1) ** 2  # of spread, what the scatter of `drawn` about m takes away on average
    variance = np.sum(drawn * (1 - drawn) / (1 - lost) / n) / n.size**2
    effective = spread / variance if spread > 0 else n.size**2 / np.sum(1 / n)
    return _wilson(mean, float(effective), confidence)


def _check_counts(correct: np.ndarray, n: np.ndarray) -> None:
    if (n < 1).any() or (correct < 0).any() or (correct > n).any():
        raise ValueError(f"{correct.tolist()} right answers of {n.tolist()} questions: each from 0 to n, n at least 1")


def _wilson(share: float, n: float, confidence: float) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, but should lie between 0 and 1, for example 0.95")
    z2 = float(ndtri((1 + confidence) / 2)) ** 2
    middle, half = share + z2 / (2 * n), math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
    low, high = (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)
    # none and all right: the limit is the share itself, without rounding
    return 0.0 if share == 0 else low, 1.0 if share == 1 else high


def ratio_interval(sums: ArrayLike, counts: ArrayLike, *, confidence: float = 0.95) -> MeanInterval:
    """Return the mean of values that come in clusters, with the interval of drawing other clusters.

    The ratio estimator of cluster sampling (W. G. Cochran, Sampling Techniques, 1977, section 9A.4): the mean m is
    sum(sums) / sum(counts), its variance that of the clusters' residuals, sums - m counts; Student's t with n - 1
    degrees of freedom. One cluster, and sums that are not finite, have no interval: NaN.

    Parameters
    ----------
    sums, counts : array of float, shape (n,)
        Of each cluster: the sum of its values (a passage's loss), and how many they are (its tokens).
    """
    sums, counts = _vector(sums, "sums", np.float64), _vector(counts, "counts", np.float64)
    if sums.size != counts.size or not (counts > 0).all():
        raise ValueError(f"{sums.size} sums and {counts.size} counts: as many, and every count above 0")
    n, total = sums.size, float(counts.sum())
    mean = float(sums.sum()) / total
    if n < 2 or not math.isfinite(mean):
        return MeanInterval(mean, math.nan, math.nan)
    error = math.sqrt(n / (n - 1) * float(np.sum((sums - mean * counts) ** 2))) / total
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * error
    return MeanInterval(mean, mean - half, mean + half)


def without_far_worse(values: ArrayLike, *, lower: bool) -> list[float]:
    """Return the values, in order, but for those far worse than the bulk, which would leave a drawing no room for the
    others: beyond Tukey's outer fence on that side, three interquartile ranges from the quartile (J. W. Tukey,
    Exploratory Data Analysis, 1977). All of them where half of all are one.

    Parameters
    ----------
    values : array of float, shape (n,)
    lower : bool
        Whether a lower value is the better one.
    """
    values = _vector(values, "values", np.float64)
    low, high = np.percentile(values, [25, 75])
    reach = 3 * (high - low) if high > low else math.inf
    return values[values <= high + reach if lower else values >= low - reach].tolist()


def colour_scale(values: ArrayLike) -> tuple[float, float]:
    """Return the ends of a scale of colours for these values: from 0, or from their 1st percentile where they are all
    so high that they would look alike on a scale from 0, to their 99th percentile.

    Parameters
    ----------
    values : array of float, shape (n,)
    """
    low, high = map(float, np.percentile(_vector(values, "values", np.float64), [1, 99]))
    low = min(0.0, low) if low < 0.5 * high else low
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Return Holm's adjusted p-values (m,): rejecting those of at most a errs at all with a chance of at most a.

    The k-th smallest is multiplied by m - k + 1, made monotone, and capped at 1 (S. Holm, Scand. J. Statist. 6, 1979);
    no assumption about how the tests depend on each other.

    Parameters
    ----------
    p_values : array of float, shape (m,)
    """
    p = _vector(p_values, "p_values", np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values {p.tolist()} should lie between 0 and 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return adjusted


def answer_nll(logits: ArrayLike, answer: ArrayLike) -> np.ndarray:
    """Return the negative log-likelihood (nats) of the correct letter among the four.

    Parameters
    ----------
    logits : array of float, shape (n, 4)
        Logits of the answer letters A to D; computed in float64 whatever their dtype.
    answer : array of int, shape (n,)
        Correct letter, 0 to 3.

    Returns
    -------
    array of float64, shape (n,)
    """
    logits = np.asarray(logits, dtype=np.float64)
    answer = np.asarray(answer)
    if logits.ndim != 2 or logits.shape[1] != 4 or answer.shape != logits.shape[:1]:
        raise ValueError(f"logits {logits.shape} and answer {answer.shape} should be (n, 4) and (n,)")
    answer = answer.astype(np.int64, casting="same_kind")
    if answer.size and not (0 <= answer.min() and answer.max() <= 3):
        raise ValueError(f"answers lie in {answer.min()}..{answer.max()}, but the letters A to D are 0..3")
    return logsumexp(logits, axis=1) - np.take_along_axis(logits, answer[:, None], axis=1)[:, 0]


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> McNemar:
    """Exact McNemar test of two plans on the same questions.

    Under the null a question on which the two disagree favours either with probability 1/2, so
    `only_a` is binomial(only_a + only_b, 1/2); with no disagreement p = 1. Exact, hence right for
    the handful of discordant questions near-equal plans have, where the chi-square form is not.

    Parameters
    ----------
    correct_a, correct_b : array of bool, shape (n,)
        Row i of both is the same question.
    """
    a, b = _pair(correct_a, correct_b, bool)
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    discordant = only_a + only_b
    # Both tails are alike; where only_a == only_b they meet in the middle.
    p_value = min(1.0, 2 * float(bdtr(min(only_a, only_b), discordant, 0.5)))
    return McNemar(only_a, only_b, p_value)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    counts: ArrayLike | None = None,
    confidence: float = 0.95,
    n_resamples: int = 10_000,
    random_state: int = 0,
) -> PairedDifference:
    """Return mean(a - b) with an interval and a sign-flip p-value.

    With `counts` items are sums of so many values, and the mean is that of the values. The interval is then of the
    items' residuals, as `ratio_interval`'s: a passage cut short by the end of its text is no outlier for its length.

    The interval is the percentile bootstrap's: questions are resampled as pairs, so that what both plans find hard
    cancels. Its percentiles are expanded (T. Hesterberg, Amer. Statist. 69, 2015), since resampled means scatter by
    sqrt((n - 1) / n) too little and know nothing of Student's t. Of less than 8 items, too few for resampling, it is
    Student's t interval of d = a - b (Student, Biometrika 6, 1908); of one item it has no limits.

    Of right and wrong answers (0 and 1) it is that of Bonett and Price (Brit. J. Math. Stat. Psych. 65, 2012): a
    bootstrap knows nothing of disagreements that a sample lacks. Without any its interval is 0 to 0; with 4 in 20
    questions, all for one plan, it leaves out 0 where McNemar's p is 0.125.

    The p-value comes from `n_resamples` random flips of the signs of a - b (the null: a and b can be swapped on any
    question), counted with the observed draw, so it is never below 1 / (n_resamples + 1).

    Parameters
    ----------
    a, b : array of float or bool, shape (n,)
        A measure per question (correctness, NLL in nats); row i of both is the same question.
    counts : array of float, shape (n,), optional
        How many values each item is the sum of (a passage's tokens); None where each is a value itself.
    confidence : float in (0, 1)
    n_resamples : int
    random_state : int
        Seed; the same arguments give the same result.
    """
    a, b = _pair(a, b, np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a paired difference needs finite values; leave out questions that failed")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, but should lie between 0 and 1, for example 0.95")
    if n_resamples < 1:
        raise ValueError(f"n_resamples is {n_resamples}, but at least 1 is needed")
    rng = np.random.default_rng(random_state)
    d = spread = a - b
    if counts is not None:
        lengths, _ = _pair(counts, d, np.float64)
        if not (np.isfinite(lengths) & (lengths > 0)).all():
            raise ValueError(f"counts {lengths.tolist()} should all be finite and above 0")
        d = d / lengths.mean()
        spread = d + d.mean() * (1 - lengths / lengths.mean())  # the same mean; residuals instead of sums
    observed = float(d.mean())
    if counts is None and np.isin(np.stack([a, b]), (0.0, 1.0)).all():
        low, high = _shares_interval(int(np.sum(d > 0)), int(np.sum(d < 0)), d.size, confidence)
    elif d.size == 1:
        low, high = -math.inf, math.inf
    elif d.size < _BOOTSTRAP_FROM:
        _, low, high = ratio_interval(spread, np.ones(d.size), confidence=confidence)
    else:
        tail = _expanded_tail(d.size, confidence)
        low, high = np.percentile(_bootstrap_means(spread, n_resamples, rng), [100 * tail, 100 * (1 - tail)])
    flipped = np.abs(_sign_flip_means(d, n_resamples, rng))
    # ties with the observed value must count although both carry rounding
    extreme = int(np.sum(flipped >= abs(observed) - 1e-12 * max(1.0, np.abs(d).max())))
    return PairedDifference(observed, float(low), float(high), (1 + extreme) / (1 + n_resamples))


def _shares_interval(only_a: int, only_b: int, n: int, confidence: float) -> tuple[float, float]:
    """Bonett and Price's interval of the difference of two shares of the same n questions: the normal one with a
    question more that only a, and one that only b, got right."""
    z = float(ndtri((1 + confidence) / 2))
    shares = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    middle = shares[0] - shares[1]
    half = z * math.sqrt((sum(shares) - middle**2) / (n + 2))
    return max(-1.0, middle - half), min(1.0, middle + half)


def _expanded_tail(n: int, confidence: float) -> float:
    """The share of resampled means of n items to leave out on each side, so that of normal items the t interval's width
    is left."""
    return float(ndtr(-math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 + confidence) / 2)))


def _bootstrap_means(d: np.ndarray, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `n_resamples` samples of d drawn with replacement, shape (n_resamples,)."""
    values, counts = np.unique(d, return_counts=True)
    if values.size <= 64:  # drawing the counts is the same law, ~1000 times cheaper
        return rng.multinomial(d.size, counts / d.size, size=n_resamples) @ values / d.size
    step = max(1, _CHUNK // d.size)
    sizes = [min(step, n_resamples - start) for start in range(0, n_resamples, step)]
    draws = (rng.integers(d.size, size=(size, d.size), dtype=np.uint32) for size in sizes)
    return np.concatenate([d.take(rows).mean(axis=1) for rows in draws])


def _sign_flip_means(d: np.ndarray, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of d with every sign drawn anew, shape (n_resamples,)."""
    values, counts = np.unique(np.abs(d), return_counts=True)
    if values.size <= 64:
        return (2 * rng.binomial(counts, 0.5, size=(n_resamples, values.size)) - counts) @ values / d.size
    step = max(1, _CHUNK // d.size)
    sizes = [min(step, n_resamples - start) for start in range(0, n_resamples, step)]
    total = d.sum()
    width = -(-d.size // 8)  # one random bit a sign; as float64, so that BLAS multiplies
    bits = (np.frombuffer(rng.bytes(size * width), np.uint8).reshape(size, width) for size in sizes)
    kept = (np.unpackbits(rows, axis=1, count=d.size).astype(np.float64) @ d for rows in bits)
    return np.concatenate([(2 * chosen - total) / d.size for chosen in kept])


def _vector(values: ArrayLike, name: str, dtype: type) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}, but should be one value per item, at least one")
    if dtype is bool and array.dtype != bool:
        raise ValueError(f"{name} has dtype {array.dtype}, but should be bool: say which questions were right")
    return array.astype(dtype)


def _pair(a: ArrayLike, b: ArrayLike, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    a, b = _vector(a, "a", dtype), _vector(b, "b", dtype)
    if a.size != b.size:
        raise ValueError(f"a has {a.size} questions and b has {b.size}; a paired test needs the same questions in both")
    return a, b
