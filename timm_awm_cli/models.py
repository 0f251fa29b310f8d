import argparse
import csv
from pathlib import Path

HELP = 'list the models'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Lists the models: size of the images in px, parameters, how many of them are in merges, and number of merges. '
        'GMACs are those of the multiplications in convolutions and matrices, for one image.')
    parser.epilog = 'Example: timm-awm models | grep cifar'


def run(args: argparse.Namespace) -> None:
    with Path(__file__).with_name('models.csv').open(encoding='utf-8') as file:  # counting takes half a minute
        header, *rows = csv.reader(file)
    rows = [[cell if not cell.isdigit() else f'{int(cell):,}' for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for name, *cells in (header, *rows):
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:])), sep='  ')
