"""transformers.Trainer on adapted models: what AdaLoRA and DyLoRA do in each step, and checkpoints without the base.

    model = pyfastpeft.adapt(model, AdaLoraConfig(...))
    Trainer(model, ..., callbacks=[AdapterCallback(model)]).train()

Other methods need no callback to train.
"""

from functools import partial
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from ..methods.adapt import adaptation, need_adapter
from ..methods.checkpoint import save_adapter
from ..methods.configs import AdaLoraConfig, DyLoraConfig
from ..methods.files import tensors_as_bytes, write_files
from ..methods.inject import head
from ..methods.losses import regularize
from ..methods.ranks import RankAllocator, draw_rank, orthogonality_loss, set_rank
from ..ops.checks import need

_ALLOCATORS = "rank_allocators."  # what keys of an allocator's tensors in the model's state dict begin with


class AdapterCallback(TrainerCallback):
    """Drives the active adapters of `model` through Trainer's steps.

    AdaLoRA: importances are observed and ranks allocated after every optimizer step, whose gradients are still there;
    the orthogonality term joins the loss once a step. A total_step that is None becomes the number of steps that
    Trainer takes. DyLoRA: each step's rank is drawn when it begins, from Trainer's seed, and serves all of its
    micro-batches; evaluation sees all ranks.

    Checkpoints hold what trains, buffers and the allocators' state, not the frozen base model, as model.safetensors for
    `Trainer.train(resume_from_checkpoint=...)`, which goes on as if it had not been interrupted; and of transformers
    models the adapters in PEFT's format: "default" there, others in directories of their names.

    Args:
        model: the adapted model that Trainer is given.
        orthogonality: whether AdaLoRA's term is added to the loss that the model returns. Set it False where the loss
            is formed elsewhere, as by compute_loss_func or for label_smoothing_factor, and add `orthogonality_loss` in
            the former, which may smooth labels, too.

    Attributes: allocators, adapter's name -> `RankAllocator`. After training `finalize()` of one drops pruned ranks.
    """

    def __init__(self, model: nn.Module, orthogonality: bool = True):
        """Raises ValueError unless the model is adapted."""
        known = adaptation(model, "AdapterCallback")
        training = {name: known.configs[name] for name in known.active if not known.configs[name].inference_mode}
        self.model, self.orthogonality, self.training = model, orthogonality, training
        self.allocators = {n: RankAllocator(model, n) for n, c in training.items() if isinstance(c, AdaLoraConfig)}
        self.nested = [name for name, config in training.items() if isinstance(config, DyLoraConfig)]
        self.hooks = []
        # A checkpoint is loaded before training begins. Hooks of state dicts are partials, not bound methods, since
        # torch sets an attribute on them.
        model.register_load_state_dict_pre_hook(self._load_allocators)
        model.register_load_state_dict_post_hook(partial(self._allow_missing))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        own = any(module is self.model for module in model.modules())
        need(own, "AdapterCallback", "model", "another than Trainer trains", "the one given to Trainer")
        for name in self._current():
            need_adapter(self.model, "AdapterCallback", name)
        trains = any(parameter.requires_grad for parameter in self.model.parameters())
        needed = "one that trains: load_adapter(..., is_trainable=True), or a config without inference_mode"
        need(trains, "AdapterCallback", "model", "one of which all parameters are frozen", needed)
        self._release()
        self.hooks.append(self.model.register_state_dict_post_hook(partial(self._trained_only)))
        if isinstance(self.model, PreTrainedModel):
            self.model.save_pretrained = self._save
        for name, allocator in self.allocators.items():
            if allocator.config.total_step is None:
                allocator.config.total_step = state.max_steps
                allocator.config.__post_init__()
            if self.orthogonality:
                self.hooks.append(regularize(self.model, lambda name=name: orthogonality_loss(self.model, name)))

    def on_step_begin(self, args, state, control, **kwargs):
        for name in self.nested:
            draw_rank(self.model, name, step=state.global_step, seed=args.seed)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Raises ValueError where the head is not called, but its weight read, as TRL's trainers do."""
        parts = getattr(head(self.model), "adapters", {})
        own = [p for name in self._current() if name in parts for p in parts[name].parameters() if p.requires_grad]
        reached = any(p.grad is not None for p in own) or all(p.grad is None for p in self.model.parameters())
        given, needed = "one whose head has an adapter, but is never called", "without: modules_to_save trains it whole"
        need(not own or reached, "AdapterCallback", "model", given, needed)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if not getattr(optimizer, "step_was_skipped", False):
            for allocator in self.allocators.values():
                allocator.step(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        for name in self.nested:
            set_rank(self.model, name)

    def on_train_end(self, args, state, control, **kwargs):
        self._release()

    def _frozen(self) -> set[str]:
        every = self.model.named_parameters(remove_duplicate=False)
        return {name for name, parameter in every if not parameter.requires_grad}

    def _release(self):
        self.model.__dict__.pop("save_pretrained", None)
        while self.hooks:
            self.hooks.pop().remove()

    def _save(self, directory, is_main_process=True, state_dict=None, **options):
        """What the model's save_pretrained is while it trains. That one renames tensors of some architectures as older
        versions had them, and Trainer does not find them again."""
        if is_main_process:
            self.model.config.save_pretrained(directory)
            for name in self._current():
                save_adapter(self.model, directory if name == "default" else Path(directory, name), name)
            write_files(directory, {"model.safetensors": tensors_as_bytes(state_dict or self.model.state_dict())})

    def _trained_only(self, module, state_dict, prefix, metadata):
        """Hook of the model's state dict: leaves what a checkpoint holds, and adds the allocators' state."""
        for name in self._frozen():
            state_dict.pop(prefix + name, None)
        for name, allocator in self.allocators.items():
            for key, tensor in allocator.state_dict().items():
                state_dict[f"{prefix}{_ALLOCATORS}{name}.{key}"] = tensor

    def _current(self) -> list[str]:
        """The adapters that the model has still, without those that were deleted, of whose name it may have another."""
        configs = self.model.pyfastpeft.configs if hasattr(self.model, "pyfastpeft") else {}
        return [name for name, config in self.training.items() if configs.get(name) is config]

    def _load_allocators(self, module, state_dict, prefix, *args):
        """Hook before the model loads a state dict: reads the allocators' state, as other callbacks of the model do."""
        for name in self._current():
            begin = f"{prefix}{_ALLOCATORS}{name}."
            held = {key.removeprefix(begin): state_dict[key] for key in state_dict if key.startswith(begin)}
            if held and name in self.allocators:
                self.allocators[name].load_state_dict(held)

    def _allow_missing(self, module, incompatible):
        """Hook after the model has loaded one: the allocators' state was for this callback, and without any frozen
        parameter, it was meant to hold none. Raises RuntimeError where all that it held is unknown, as of another
        adapter, which Trainer would pass over."""
        current = self._current()
        own = tuple(f"{_ALLOCATORS}{name}." for name in current)
        incompatible.unexpected_keys[:] = [key for key in incompatible.unexpected_keys if not key.startswith(own)]
        frozen, missing = self._frozen(), set(incompatible.missing_keys)
        if frozen <= missing:
            incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in frozen]
            foreign = current and incompatible.unexpected_keys
            holds = not foreign or any(name not in missing for name, _ in self.model.named_parameters())
            given, needed = f"one without anything that {current} train", "a checkpoint of these adapters"
            need(holds, "AdapterCallback", "state_dict", given, needed, RuntimeError)
