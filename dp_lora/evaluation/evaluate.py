"""One evaluation: distances, utility and copies of samples, beside the references that give them a meaning."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dp_lora.config import ROOT, relative
from dp_lora.config.prompts import class_prompts
from dp_lora.config.schema import Config
from dp_lora.data.layout import Dataset, has_split, read_dataset
from dp_lora.errors import InputError
from dp_lora.evaluation.base_samples import MOST, Labelled, samples_of_base
from dp_lora.evaluation.cache import Cache
from dp_lora.evaluation.captions import caption_measurements
from dp_lora.evaluation.classifier import ClassifierTraining, predict
from dp_lora.evaluation.clip import clip_score, load_clip
from dp_lora.evaluation.copying import look_for_copies, write_pairs
from dp_lora.evaluation.distances import fid_and_kid, letter_distances
from dp_lora.evaluation.features import FeatureSets, FeatureSpace, PictureSets
from dp_lora.evaluation.inception import NAME, SHA256, Inception, fetch_weights
from dp_lora.evaluation.letter_features import letter_features
from dp_lora.evaluation.measurement import Measurement
from dp_lora.evaluation.membership import membership_scores
from dp_lora.evaluation.pictures import require_same_shape, utility_pictures
from dp_lora.evaluation.precision_recall import NEIGHBOURS, precision_recall_scores
from dp_lora.evaluation.references import before_finetuning, public_only, require_public_reference, train_on_real
from dp_lora.evaluation.report import EvaluationResult, write_result
from dp_lora.evaluation.utility import Task, labelled_by
from dp_lora.events import Events
from dp_lora.models.adapters import apply_adapter, remove_lora
from dp_lora.models.folder import Model
from dp_lora.sampling import SPLIT

# one seed for every classifier of every experiment: two evaluations differ in their images alone
CLASSIFIER_SEED = 0


def evaluate(
    config: Config,
    samples_folder: Path,
    drawn: Sequence[str],
    covered: bool,
    private_folder: Path,
    public_folder: Path | None,
    base: Model,
    untrained: Model | None,
    adapters: Mapping[str, Path],
    cache_folder: Path,
    private_cache_folder: Path,
    out_folder: Path,
    events: Events,
) -> EvaluationResult:
    """Score the samples against the real pictures and write `out_folder`, whole or not at all.

    `drawn` names the samples' classes or prompts, in order. `base` is the model without an adapter, whose autoencoder
    made the samples; `untrained` the same with the class embedding that fine-tuning starts from, for
    config.data.classes; None for a text-to-image base, whose samples are of prompts: those of config.data.prompts are
    of its class, and without them nothing of classes is scored.
    `covered`: a guarantee holds for the samples. `adapters` are asked for their members: "" drew the samples, and any
    other stands beside it, under the ending of its metrics' names; without one membership is left out.
    `public_folder` holds the public letters; it may be None where evaluation.inception_weights is set. What does not
    depend on the samples is kept: what comes of public pictures alone in `cache_folder`, all else in
    `private_cache_folder`, which is removed with the private pictures.
    Reads private training and test pictures without noise: every number here is for the operator alone.
    Raises InputError for too few images, mixed sizes, classes that do not match and features that are not finite.
    """
    require_public_reference(config)
    classes = list(config.data.classes)
    samples = read_dataset(samples_folder, list(drawn), SPLIT)
    subjects = classes if untrained is not None else _drawn_class_prompts(config, samples, events)
    real = read_dataset(private_folder, classes, "train")
    # utility needs test pictures, and raises where there are none
    has_test = untrained is not None or has_split(private_folder, "test")
    test = read_dataset(private_folder, classes, "test") if has_test else None
    require_same_shape(samples, real)
    cache, private_cache = Cache(cache_folder), Cache(private_cache_folder)
    training = ClassifierTraining(config.evaluation.classifier_steps, CLASSIFIER_SEED)
    sets = PictureSets(samples, real, test, base, config.evaluation.min_images, private_cache)
    sets.require_enough()
    measurements = [Measurement("samples", len(samples), "number of samples evaluated", private=False)]
    if config.evaluation.clip is not None:
        measurements.append(_clip_measurement(config.evaluation.clip, samples, untrained is None, covered, base))

    @functools.cache  # the digest of a large model's weights, which names the kept samples, takes a while
    def of_base(names: tuple[str, ...]) -> Labelled:
        """Samples of the base before fine-tuning, of these classes or prompts."""
        model = untrained or replace(base, info={**base.info, "size": samples.size, "classes": samples.classes})
        return samples_of_base(config, model, list(names), len(samples), private_cache)

    all_drawn = tuple(classes if untrained is not None else samples.classes)

    distances, features = _distances(config, sets, public_folder, training, cache, events)
    measurements += distances
    copying = None
    least = max(config.evaluation.min_images, NEIGHBOURS + 1)
    enough = test is not None and min(len(test), len(samples)) >= least
    if enough:
        measurements += precision_recall_scores(features)
        copying = look_for_copies(features, of_base(all_drawn)[0])
        measurements += copying.scores()
        # it shows private pictures: it is removed with the caches when one is withdrawn, and nothing else keeps it
        pairs = private_cache.folder / f"nearest_pairs-{samples.digest()[:12]}.png"
        write_pairs(pairs, copying, samples, real)
        events.terminal(f"{relative(pairs)}: samples beside the nearest training pictures; for your eyes alone")
    else:
        events.terminal(
            f"precision, recall, copies and membership are left out: they need at least {least} test pictures, and as "
            "many samples (evaluation.min_images)"
        )

    if public_folder is not None and test is not None and config.data.captions and base.pipeline is not None:
        public = read_dataset(public_folder, list(config.public.classes), "train")
        if public.captions is not None:
            measurements += caption_measurements(
                samples, public, real, test, of_base(all_drawn), training, private_cache, base.device
            )

    result = EvaluationResult(measurements, Path(out_folder), copying=copying)
    if subjects and test is not None:
        task = Task(utility_pictures(test), test.labels, test.digest(), classes, training, base.device)
        result = _with_utility(
            result, config, task,
            drawn=labelled_by((utility_pictures(samples), samples.labels), samples.classes, subjects),
            real=real, start=(*_start_score(untrained), of_base(tuple(subjects))), private_cache=private_cache,
        )  # fmt: skip
    if test is not None and enough:
        for ending, folder in adapters.items():
            model = apply_adapter(base, folder)  # in place
            more = membership_scores(model, config, real, test, private_cache.folder, ending)
            result = replace(result, measurements=[*result.measurements, *more])
            remove_lora(base.denoiser)
    write_result(result)
    if result.score is not None:
        events.image(f"{result.folder.name}/confusion", result.folder / "confusion.png", private=True)
    return result


def _drawn_class_prompts(config: Config, samples: Dataset, events: Events) -> list[str]:
    """The prompt of each of data.classes where each has samples and names one class alone, else none."""
    subjects = class_prompts(config)
    # with fewer samples than prompts, some of these were drawn not once
    drawn = {samples.classes[label] for label in set(samples.labels.tolist())}
    if len(set(subjects)) == len(subjects) and set(subjects) <= drawn:
        return subjects
    events.terminal("accuracy is left out: it needs samples of each of data.prompts, and no two of these alike")
    return []


def _clip_measurement(clip: str, samples: Dataset, of_prompts: bool, covered: bool, base: Model) -> Measurement:
    """CLIP score of samples of public prompts. It reads no private picture: the samples' guarantee covers it."""
    shown = f"evaluation.clip={clip}"
    if not of_prompts:
        raise InputError(f"{shown}: these samples are of classes, not of prompts; set it to null")
    model, processor = load_clip(ROOT / clip, shown, base.device)
    meaning = "100 times the mean cosine of CLIP's embeddings of a sample and of the public prompt that it was drawn of"
    return Measurement("clip_score", clip_score(samples, model, processor), meaning, private=not covered)


def _distances(
    config: Config,
    sets: PictureSets,
    public_folder: Path | None,
    training: ClassifierTraining,
    cache: Cache,
    events: Events,
) -> tuple[list[Measurement], FeatureSets]:
    """Distances in each space that there is, and the features of all else: Inception's, without these the letters'."""
    measurements, device, found = [], sets.base.device, []
    if config.evaluation.inception_weights is not None:
        weights_sha256 = config.evaluation.inception_sha256 or SHA256
        folder = fetch_weights(config.evaluation.inception_weights, cache.folder, events, weights_sha256)
        space = FeatureSpace("inception", "Inception", weights_sha256, Inception(folder, device).features)
        found.append(FeatureSets(space, sets))
        measurements += fid_and_kid(found[-1])
    elif public_folder is None:
        raise InputError(f"evaluation.inception_weights=null: without public letters a distance needs a copy of {NAME}")
    if public_folder is not None:
        letters = letter_features(public_folder, list(config.public.classes), training, cache, device)
        space = FeatureSpace("letter", "classifier of the public pictures", letters.facts, letters.features)
        found.append(FeatureSets(space, sets))
        measurements += letter_distances(found[-1])
    return measurements, found[0]


def _start_score(untrained: Model | None) -> tuple[str, str]:
    """Name and meaning of the score of what the base drew before fine-tuning."""
    meaning = f"the same, classifier of at most {MOST} samples from the base"
    if untrained is None:
        return "accuracy_base", meaning
    return "accuracy_untrained_embedding", f"{meaning} with its untrained class embedding"


def _with_utility(
    result: EvaluationResult,
    config: Config,
    task: Task,
    drawn: Labelled,
    real: Dataset,
    start: tuple[str, str, Labelled],
    private_cache: Cache,
) -> EvaluationResult:
    """`result` with the classifier scores of samples `drawn`, beside those of ceiling, start and public pictures alone.

    `drawn` and the base's samples, the last of `start`, are labelled by class; the others are the name and the meaning
    of the start's score.
    """
    measurements, classes = list(result.measurements), task.classes
    images, labels = drawn
    synthetic = task.score(task.train(images, labels, "classifier of samples"))
    measurements.append(
        Measurement.accuracy("accuracy", synthetic, "real test pictures right, classifier of samples alone")
    )
    network, ceiling = train_on_real(task, real, private_cache)
    measurements.append(
        Measurement.accuracy("accuracy_train_on_real", ceiling, "the same, classifier of real pictures")
    )
    name, meaning, of_base = start
    measurements.append(Measurement.accuracy(name, before_finetuning(task, of_base, private_cache), meaning))
    public = public_only(task, config, private_cache)
    if public is not None:
        meaning = "the same, classifier of public pictures of these classes, no private picture seen"
        measurements.append(Measurement.accuracy("accuracy_public_only", public, meaning))

    agrees = predict(network, images, task.device)[0].argmax(axis=1) == labels
    meaning = "samples that the classifier of real pictures puts in the class they were drawn for"
    measurements.append(Measurement("class_agreement", float(agrees.mean()), meaning, private=True))
    per_class = [float(agrees[labels == c].mean()) for c in range(len(classes))]
    return replace(result, measurements=measurements, classes=classes, score=synthetic, class_agreement=per_class)
