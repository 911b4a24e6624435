"""The error tree.

LorafleetError
├── ConfigError            a setting or a command-line value is wrong        (exit code 2)
├── InvalidRequest         a field of a generation request is out of range   (HTTP 422)
├── BaseNotFound           no base model under that id, path or revision     (exit code 1)
├── BaseUnreadable         a base model is there but cannot be loaded        (exit code 1)
├── RecipeMismatch         a recipe was made by another base model           (HTTP 409)
├── ModelNotFound          no model under that id is served                  (HTTP 404)
├── JobNotFound            no job under that id, or not any more             (HTTP 404)
├── IdempotencyConflict    one idempotency key for different requests        (HTTP 409)
├── PairNotFound           no such pair of pictures, or none left           (HTTP 404)
├── SessionNotFound        no rater's session under that token              (HTTP 404)
├── AlreadyVoted           a session voted on that pair before              (HTTP 409)
├── AdapterNotFound        no adapter under that name, alias or version      (HTTP 404)
├── AdapterInUse           an alias points at what is to be deleted          (HTTP 409)
├── AdapterTooLarge        an adapter file is above the registry's limit     (HTTP 413)
├── AdapterUnreadable      an adapter file is no whole, plain LoRA           (HTTP 422)
├── AdapterIncompatible    a sound adapter does not fit this base or bank    (HTTP 409)
├── StorageUnavailable     a registry, source or disk cannot be used         (HTTP 503)
├── DataNotFound           there are no pictures to train on                 (exit code 1)
├── DataUnreadable         a picture, caption or cache is missing or damaged (exit code 1)
├── AdminKeyUnset          the service takes no changes, it has no admin key (HTTP 403)
├── InvalidAdminKey        a change came without the admin key               (HTTP 401)
├── Overloaded             the queue is full, try again later                (HTTP 429)
│   └── AdapterBusy        every adapter slot is in use, try again later     (HTTP 503)
├── NotReady               no replica can answer yet                         (HTTP 503)
├── DeadlineExceeded       the request's time is up                          (HTTP 504)
├── GenerationFailed       the model produced no usable image                (HTTP 500)
├── CheckpointMismatch     a checkpoint was made by another run              (exit code 1)
├── EvaluationFailed       an evaluation cannot go on                        (exit code 1)
└── TrainingFailed         a run cannot go on                                (exit code 1)
    └── TrainingStopped    a run was asked to stop, and can go on            (exit code 130)

Each class carries a stable `code` for machines; the message is one sentence for people that names the field
and the fix. HTTP statuses are chosen in one place, `lorafleet.serve.api`.
"""

from typing import ClassVar


class LorafleetError(Exception):
    """Base of every error this project raises on purpose.

    `param` names the request field or setting at fault, if there is one.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (replica -> gateway): keyword arguments need help to be pickled.
        return _rebuild, (type(self), self.message, self.param, self.__dict__.copy())


def _rebuild(cls: type[LorafleetError], message: str, param: str | None, state: dict[str, object]) -> LorafleetError:
    error = cls(message, param=param)
    error.__dict__.update(state)
    return error


class ConfigError(LorafleetError):
    """A setting is unknown, unparsable, out of range or contradicts another one."""

    code = "invalid_config"


class InvalidRequest(LorafleetError):
    """A field of a request is unknown, of the wrong type or out of range."""

    code = "invalid_value"


class BaseNotFound(LorafleetError):
    """No base model under the given id, path or revision."""

    code = "base_not_found"


class BaseUnreadable(LorafleetError):
    """The base model's folder is there but incomplete, corrupt or of another architecture."""

    code = "base_unreadable"


class RecipeMismatch(LorafleetError):
    """A recipe asks for another base model than the one that is loaded."""

    code = "recipe_mismatch"


class ModelNotFound(LorafleetError):
    """No model under that id is served."""

    code = "model_not_found"


class JobNotFound(LorafleetError):
    """There is no job under that id; it may have ended long ago."""

    code = "job_not_found"


class IdempotencyConflict(LorafleetError):
    """An idempotency key came back with another request."""

    code = "idempotency_conflict"


class PairNotFound(LorafleetError):
    """The arena has no pair left for this session, or showed it none under that id."""

    code = "pair_not_found"


class SessionNotFound(LorafleetError):
    """The arena knows no session under that token."""

    code = "session_not_found"


class AlreadyVoted(LorafleetError):
    """A session has voted on that pair; votes are not changed."""

    code = "already_voted"


class AdapterNotFound(LorafleetError):
    """The registry has no such adapter, alias or version; the message offers the nearest names."""

    code = "adapter_not_found"


class AdapterInUse(LorafleetError):
    """An alias, which the message names, points at a version that is to be deleted."""

    code = "adapter_in_use"


class AdapterTooLarge(LorafleetError):
    """An adapter's file is larger than the registry takes."""

    code = "adapter_too_large"


class AdapterUnreadable(LorafleetError):
    """An adapter's file is a pickle, damaged, incomplete, or holds something else than plain LoRA."""

    code = "adapter_unreadable"


class AdapterIncompatible(LorafleetError):
    """An adapter was made for another base, or asks for modules or a rank that cannot be served."""

    code = "adapter_incompatible"


class StorageUnavailable(LorafleetError):
    """Where adapters or pictures are stored, or are to be, does not answer, refuses, is full or is not there."""

    code = "storage_unavailable"


class DataNotFound(LorafleetError):
    """Nothing under the given path or URL, or nothing that one could train on."""

    code = "data_not_found"


class DataUnreadable(LorafleetError):
    """A picture, its caption, or what was computed from them is missing, damaged or too large; the message names it."""

    code = "data_unreadable"


class AdminKeyUnset(LorafleetError):
    """The service has no admin key, and so takes no changes to the registry."""

    code = "admin_key_unset"


class InvalidAdminKey(LorafleetError):
    """A change to the registry came without the admin key, or with a wrong one."""

    code = "invalid_admin_key"


class Overloaded(LorafleetError):
    """The service has as much work queued as it accepts. `retry_after_s` says when to come back, `reason` in a word
    what is full, for metrics."""

    code = "overloaded"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float = 1.0, reason: str = "queue_full"
    ) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s
        self.reason = reason


class AdapterBusy(Overloaded):
    """Every adapter slot is leased or pinned at the moment; one is free again when an image is done."""

    code = "adapter_busy"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, reason="slots_busy")


class NotReady(LorafleetError):
    """No replica can answer at the moment."""

    code = "not_ready"


class DeadlineExceeded(LorafleetError):
    """The request's deadline passed before its images were done."""

    code = "deadline_exceeded"


class GenerationFailed(LorafleetError):
    """The model produced no usable image (non-finite values, out of memory)."""

    code = "generation_failed"


class CheckpointMismatch(LorafleetError):
    """A checkpoint was made with other settings, another base or other data; the message names which."""

    code = "checkpoint_mismatch"


class EvaluationFailed(LorafleetError):
    """An evaluation cannot go on, or its files are not those of one; finished pictures are kept."""

    code = "evaluation_failed"


class TrainingFailed(LorafleetError):
    """A training run cannot go on: its numbers are none, its disk is full, its workers keep dying."""

    code = "training_failed"


class TrainingStopped(TrainingFailed):
    """A run was asked to stop; its state is in a checkpoint."""

    code = "training_stopped"


def by_code() -> dict[str, type[LorafleetError]]:
    """Every class of the tree above, by its code."""
    classes = [kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, LorafleetError)]
    return {kind.code: kind for kind in classes}
