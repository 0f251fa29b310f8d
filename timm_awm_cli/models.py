import argparse

HELP = 'list the models'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Lists the models as a Markdown table. MACs are those of the multiplications in convolutions and matrices, for '
        'one image.')
    parser.epilog = "Example: timm-awm models '*_cifar'"
    parser.add_argument('pattern', nargs='?', default='awm_*', help='wildcard for names (%(default)s)')


def run(args: argparse.Namespace) -> None:
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from timm_awm.convert import GENERIC
    from timm_awm.layers import count_parameters

    names = [name for name in timm.list_models(args.pattern) if name.startswith('awm_') and name != GENERIC]
    if not names:
        raise ValueError(f'No AWM model is called {args.pattern!r}; without a pattern all are listed.')
    print('| model | image | parameters | of them in merges | merges | GMACs |')
    print('| --- | --- | ---: | ---: | ---: | ---: |')
    for name in names:
        with torch.device('meta'):
            model = timm.create_model(name).eval()
            image = torch.empty(1, *model.pretrained_cfg['input_size'])
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(image)
        size = 'x'.join(map(str, image.shape[2:]))
        total, in_merges, merges = count_parameters(model)
        gmacs = counter.get_total_flops() / 2e9
        print(f'| {name} | {size} | {total:,} | {in_merges:,} | {merges} | {gmacs:.3g} |')
