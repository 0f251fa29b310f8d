"""A Hub folder, written from a run of timm's train.py."""
import re
import shutil
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Union

import timm
import yaml
from timm.data import resolve_input_data_config

from ..utils import new_folder
from .folder import NEEDS, LabelNames, torch_defaults, write_folder
from .training_run import TrainingRun, data_name, last_part, read_checkpoint, read_results

CHECKPOINTS = dict(last='last.pth.tar', best='model_best.pth.tar')
# useless to others: where a run was reported, and where it was resumed from
DROPPED = ('wandb_project', 'wandb_tags', 'wandb_resume_id', 'resume')


def export_run(
        run: Union[str, Path],
        folder: Union[str, Path],
        checkpoint: str = 'last',
        use_ema: bool = True,
        tag: Optional[str] = None,
        license: Optional[str] = None,
        label_names: Optional[LabelNames] = None,
        results: Optional[Mapping[str, Path]] = None,
) -> None:
    """Writes what train.py left of an AWM model as a folder for the Hub.

    Args:
        run: The run's folder.
        folder: New folder, of the name that the repository is to have.
        checkpoint: 'last', 'best' (of the evaluated epochs), or a file.
        use_ema: Take the averaged weights, if the run has them. train.py evaluates these.
        tag: Names these weights, such as t3_c10.
        license: Licence of the weights (default: that of timm's weights from which the run started, apache-2.0 if it
            started from none, no licence if it started from a file).
        label_names: As for `save_for_hub` (default: those of the data set, if it is at hand).
        results: Files that validate.py wrote with --results-file, by split. They replace what train.py measured.

    Raises:
        FileExistsError: The folder exists.
        FileNotFoundError: Something is missing in the run.
        RuntimeError: The checkpoint does not fit the model of args.yaml.
        ValueError: A file is damaged, or files do not fit together.
    """
    with new_folder(Path(folder)) as partial, torch_defaults():
        trained = TrainingRun(Path(run))
        args, rows = trained.args, trained.summary
        path = trained.folder / CHECKPOINTS[checkpoint] if checkpoint in CHECKPOINTS else Path(checkpoint)
        epoch, state_dict, is_ema = read_checkpoint(path, use_ema)
        measured = [read_results(split, file) for split, file in (results or {}).items()]
        model: Any = timm.create_model(  # by the same arguments that train.py gives
            args['model'],
            in_chans=args.get('in_chans') or (args.get('input_size') or [3])[0],
            num_classes=args.get('num_classes'),
            global_pool=args.get('gp'),
            **(args.get('model_kwargs') or {}),
        )
        model.load_state_dict(state_dict)
        from_file = args.get('pretrained_path') or args.get('initial_checkpoint')
        start: Mapping[str, Any] = model.pretrained_cfg if args.get('pretrained') and not from_file else {}
        if not license and not from_file:
            license = start.get('license') if start else 'apache-2.0'
        # without what a Hub folder, from which the run may have started, says of its own weights
        model.pretrained_cfg = {k: v for k, v in model.pretrained_cfg.items() if k not in ('source', 'label_names')}
        data, data_id = data_name(args)
        cfg = dict(
            resolve_input_data_config(model, args),
            paper_ids='arXiv:1811.06878',
            description=f'{model.pretrained_cfg["architecture"]} trained on {data}. {NEEDS}',
            tag=tag,
            license=license,
        )
        # train.py evaluates the averaged weights, unless they are kept on the CPU; other files may be of other epochs
        evaluated_ema = bool(args.get('model_ema')) and not args.get('model_ema_force_cpu')
        of_epoch = path.parent.resolve() == trained.folder.resolve() and not path.name.startswith('recovery')
        row, public = rows.get(epoch, {}), public_args(args)
        split = public['val_split']
        if of_epoch and is_ema == evaluated_ema and row.get('eval_top1') and split not in (results or {}):
            top1, top5 = float(row['eval_top1']), float(row['eval_top5'])
            measured.append(dict(split=split, top1=top1, top5=top5, source=f'train.py, epoch {epoch}'))
        (partial / 'args.yaml').write_text(yaml.safe_dump(public), encoding='utf-8')
        shutil.copyfile(trained.folder / 'summary.csv', partial / 'summary.csv')
        write_folder(
            model, partial, {}, cfg, label_names or trained.label_names(model.num_classes), args=public, epoch=epoch,
            weights=path.name + (', averaged (EMA)' if is_ema else ''), data=data, data_id=data_id, measured=measured,
            best=max((float(row['eval_top1']) for row in rows.values() if row.get('eval_top1')), default=None),
            base_model=start.get('hf_hub_id'))
    hidden = [key for key, value in args.items() if value and public.get(key) != value]
    if hidden:
        print(f'Private, so left out of args.yaml or cut to the last part of a path: {", ".join(hidden)}.')


def public_args(args: Mapping[str, Any]) -> Dict[str, Any]:
    """Arguments of train.py without folders of the machine, addresses and commands."""
    public = {key: _public(value) for key, value in args.items() if key not in DROPPED}
    for key in ('model', 'kd_model_name'):
        if str(args.get(key)).startswith('hf'):  # hf-hub:, and timm's other spellings
            public[key] = args[key]
    scheme, _, path = str(args.get('dataset') or '').partition('/')
    if path:
        public['dataset'] = args['dataset'] if data_name(args)[1] else f'{scheme}/{last_part(path)}'
    return public


def _public(value: Any) -> Any:
    """A value without the folders of paths, and without addresses and commands, however deep they stand in it."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(item) for item in value]
    if not isinstance(value, str) or not re.search(r'[/\\]|^\.|pipe:|local-dir:', value):
        return value
    scheme = 'local-dir:' * value.startswith('local-dir:')
    return scheme + last_part(value.removeprefix(scheme))
