"""Metrics, each from the library that the field takes it from; a library is imported when its metric is asked for."""

from collections.abc import Sequence
from importlib.util import find_spec

# Exact and stem matches of nltk's METEOR; its synonym stage needs the WordNet corpus, which is a download of its own.
NOTES = {
    "accuracy": "scikit-learn",
    "f1": "scikit-learn; macro-averaged where there are more than two classes",
    "matthews": "scikit-learn",
    "pearson": "scipy",
    "spearman": "scipy",
    "bleu": "sacrebleu, lower-cased, 13a tokens, all references",
    "nist": "nltk, 5-grams, lower-cased 13a tokens, all references",
    "meteor": "nltk, exact and stem matches only (no WordNet synonyms), best reference, lower-cased 13a tokens",
    "rouge1": "rouge-score, F1 with stemming, best reference",
    "rouge2": "rouge-score, F1 with stemming, best reference",
    "rougeL": "rouge-score, F1 with stemming, best reference",
    "cider": "pycocoevalcap (only where it is installed), 13a tokens, document frequencies of these references",
}


def measure(names: Sequence[str], predicted: Sequence, targets: Sequence) -> dict[str, float]:
    """The metrics `names` of predictions: class numbers, scores, or texts against lists of references.

    Without pycocoevalcap "cider" is left out.
    """
    found = {}
    for name in names:
        if name != "cider" or find_spec("pycocoevalcap"):
            found[name] = float(METRICS[name](predicted, targets))
    return found


def accuracy(predicted, targets) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(targets, predicted)


def f1(predicted, targets) -> float:
    from sklearn.metrics import f1_score

    average = "binary" if set(targets) | set(predicted) <= {0, 1} else "macro"
    return f1_score(targets, predicted, average=average, zero_division=0)


def matthews(predicted, targets) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(targets, predicted)


def pearson(predicted, targets) -> float:
    from scipy.stats import pearsonr

    return 0.0 if len(set(predicted)) == 1 else pearsonr(predicted, targets).statistic


def spearman(predicted, targets) -> float:
    from scipy.stats import spearmanr

    return 0.0 if len(set(predicted)) == 1 else spearmanr(predicted, targets).statistic


def bleu(predicted, targets) -> float:
    from sacrebleu import corpus_bleu

    most = max(map(len, targets))
    streams = [[refs[i] if i < len(refs) else None for refs in targets] for i in range(most)]
    return corpus_bleu(predicted, streams, lowercase=True).score


def nist(predicted, targets) -> float:
    from nltk.translate.nist_score import corpus_nist

    try:
        return corpus_nist([[_tokens(ref) for ref in refs] for refs in targets], [_tokens(each) for each in predicted])
    except ZeroDivisionError:  # nothing predicted is long enough to hold a 5-gram
        return 0.0


def meteor(predicted, targets) -> float:
    from nltk.translate.meteor_score import meteor_score

    pairs = [([_tokens(ref) for ref in refs], _tokens(each)) for each, refs in zip(predicted, targets)]
    return sum(meteor_score(refs, each, wordnet=_NoSynonyms()) for refs, each in pairs) / len(pairs)


def rouge(name: str):
    def score(predicted, targets) -> float:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([name], use_stemmer=True)
        scores = [scorer.score_multi(refs, each)[name].fmeasure for each, refs in zip(predicted, targets)]
        return sum(scores) / len(scores)

    return score


def cider(predicted, targets) -> float:
    from pycocoevalcap.cider.cider import Cider

    references = {i: [" ".join(_tokens(ref)) for ref in refs] for i, refs in enumerate(targets)}
    return Cider().compute_score(references, {i: [" ".join(_tokens(each))] for i, each in enumerate(predicted)})[0]


def _tokens(text: str) -> list[str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()(text.lower()).split()


class _NoSynonyms:
    """Stands where nltk's METEOR looks words up in WordNet."""

    def synsets(self, word: str) -> list:
        return []


METRICS = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "bleu": bleu,
    "nist": nist,
    "meteor": meteor,
    "rouge1": rouge("rouge1"),
    "rouge2": rouge("rouge2"),
    "rougeL": rouge("rougeL"),
    "cider": cider,
}
