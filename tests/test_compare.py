"""Tests of mmsmart.compare: suites, the order of runs, and what their results amount to."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import yaml

from mmsmart.compare import (
    Mean,
    Result,
    config_text,
    dense_mean,
    draw_curves,
    duels,
    environments,
    jobs_of,
    markdown,
    read_suite,
    save_csv,
    selected,
    suite_of,
)

CONFIG = 'configs/mmpretrain/resnet14_1xb64_cifar10_smart.py'
DENSE = 'configs/mmpretrain/resnet14_1xb64_cifar10.py'


def content(**changes):
    """A suite of two tasks, of which one trains its dense network."""
    return {
        'tasks': {
            'small': {'config': CONFIG, 'dense': DENSE, 'metric': 'accuracy/top1'},
            'given': {
                'config': CONFIG,
                'checkpoint': 'dense_s{seed}.pth',
                'metric': 'accuracy/top1',
                'blocks': ['channel'],
                'sparsities': [0.5],
                'options': {'train_cfg.max_epochs': 5, 'train_cfg': {'val_interval': 5}},
            },
        },
        'methods': {
            'smart': None,
            'fixed temperature': {
                'method': 'smart',
                'temperature': {'start': 0.1, 'end': 0.1},
                'options': {'train_cfg.max_epochs': 7},
            },
        },
        'blocks': ['8x8', [16, 8, 1, 1]],
        'sparsities': [0.7, 0.9],
        'seeds': [3, 1],
        **changes,
    }


@pytest.fixture
def suite():
    return suite_of(content(), 'trial')


def test_runs_come_seed_by_seed_dense_ones_first_and_methods_in_turn(suite):
    names = [job.name for job in jobs_of(suite)]
    assert names[:6] == [
        'small/dense/seed3',
        'small/smart/8x8/0.7/seed3',
        'small/fixed-temperature/8x8/0.7/seed3',
        'small/smart/8x8/0.9/seed3',
        'small/fixed-temperature/8x8/0.9/seed3',
        'small/smart/16x8x1x1/0.7/seed3',
    ]
    # Per seed: one dense run, 2 x 2 cells of two methods, and the other task's only cell.
    assert len(names) == len(set(names)) == 2 * (1 + 8 + 2)
    assert [name[-1] for name in names] == 11 * ['3'] + 11 * ['1']
    assert names[9:11] == [f'given/{m}/channel/0.5/seed3' for m in ('smart', 'fixed-temperature')]


def test_runs_start_from_the_dense_network_of_their_seed_or_from_the_given_one(suite):
    for job in jobs_of(suite):
        if job.task == 'given':
            assert job.dense is None and job.checkpoint == f'dense_s{job.seed}.pth'
        elif job.method:
            assert job.checkpoint is None and job.dense.name == f'small/dense/seed{job.seed}'


def test_a_config_holds_what_task_method_and_grid_say(suite, tmp_path):
    job = next(job for job in jobs_of(suite) if job.name.startswith('given/fixed'))
    file = tmp_path / 'seed3.py'
    names: dict = {}
    exec(config_text(job, file, '/weights.pth'), names)
    (base,) = names['_base_']
    assert (tmp_path / base).resolve().as_posix().endswith(CONFIG)
    assert names['train_cfg'] == {'max_epochs': 7, 'val_interval': 5}
    assert names['randomness'] == {'seed': 3} and names['load_from'] == '/weights.pth'
    assert names['smart'] == {
        'method': 'smart',
        'temperature': {'start': 0.1, 'end': 0.1},
        'sparsity': 0.5,
        'block': 'channel',
    }


def test_what_a_result_depends_on_is_in_its_settings(suite):
    """Other weights to start from are another run, though its own options are the same."""
    changed = content()
    changed['tasks']['small']['dense_options'] = {'train_cfg.max_epochs': 3}
    before, after = jobs_of(suite), jobs_of(suite_of(changed, 'trial'))
    differing = {a.name for a, b in zip(before, after) if a.settings != b.settings}
    assert differing == {job.name for job in before if job.task == 'small'}


def test_chosen_runs_bring_the_dense_ones_that_they_need(suite):
    jobs = jobs_of(suite)
    names = [job.name for job in selected(jobs, ['small/smart/8x8/*/seed1', 'given/smart/*'])]
    assert names == [
        'given/smart/channel/0.5/seed3',
        'small/dense/seed1',
        'small/smart/8x8/0.7/seed1',
        'small/smart/8x8/0.9/seed1',
        'given/smart/channel/0.5/seed1',
    ]
    with pytest.raises(ValueError, match="only: no run matches 'smart'"):
        selected(jobs, ['smart'])


def broken(path, value):
    """The content with another value at this path of keys."""
    suite = content()
    part = suite
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return suite


SMALL = ('tasks', 'small')


@pytest.mark.parametrize(
    ('suite', 'message'),
    [
        ({**content(), 'sparsity': [0.5]}, r"suite: unknown key 'sparsity'.*'sparsities'"),
        ({'methods': {}}, 'suite.tasks: is missing'),
        (content(methods={}), 'methods: is empty'),
        (content(methods=['smart']), r"methods: expected a mapping, got \['smart'\]"),
        (content(methods={'a b': {}, 'a-b': {}}), "'a b' and 'a-b' lead to one folder"),
        (content(methods={'dense': {}}), "'dense' is no name for a folder"),
        (content(methods={'smart': {'block': '8x8'}}), 'methods.smart.block.*`blocks`'),
        (broken((*SMALL, 'metrics'), 'x'), "tasks.small: unknown key 'metrics'.*'metric'"),
        (broken((*SMALL, 'metric'), 5), 'tasks.small.metric: expected text, got 5'),
        (broken((*SMALL, 'options'), {'smart.sparsity': 1}), 'options.smart.sparsity.*sparsities'),
        (broken((*SMALL, 'options'), {'load_from': 'x'}), 'options.load_from.*checkpoint'),
        (broken((*SMALL, 'options'), {'a': 1, 'a.b': 2}), 'small.options.a: given twice'),
        (broken((*SMALL, 'options'), {'a..b': 1}), r"'a..b' is no dotted key"),
        (broken(('tasks', 'given', 'dense_options'), {'a': 1}), 'given.dense_options.*no `dense`'),
        (broken((*SMALL, 'sparsities'), [0.5, 1.2]), r'small.sparsities: .*\(0, 1\), got'),
        (broken((*SMALL, 'sparsities'), [0.5, 0.5]), 'small.sparsities: 0.5 and 0.5 lead to one'),
        (broken((*SMALL, 'sparsities'), [0.1234567, 0.1234568]), "one folder, '0.123457'"),
        (broken((*SMALL, 'blocks'), ['8x8', [8, 8]]), r"'8x8' and \[8, 8\] lead to one folder"),
        (broken((*SMALL, 'seeds'), [True]), 'small.seeds: expected a list of integers'),
        (broken((*SMALL, 'seeds'), 3), 'small.seeds: expected a list of integers'),
        (broken((*SMALL, 'blocks'), [124]), 'small.blocks: expected a list of blocks.*in quotes'),
    ],
)
def test_a_bad_suite_is_refused_by_its_key(suite, message):
    with pytest.raises(ValueError, match=message):
        suite_of(suite, 'trial')


def test_a_config_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match='no_such_config'):
        suite_of(broken((*SMALL, 'config'), 'configs/no_such_config.py'), 'trial')


def written(tmp_path, text):
    file = tmp_path / 'trial.yaml'
    file.write_text(text)
    return file


def test_a_suite_is_read_from_its_file_under_its_name(tmp_path):
    suite = read_suite(written(tmp_path, yaml.safe_dump(content(), sort_keys=False)))
    assert suite == suite_of(content(), 'trial')


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    """YAML 1.1 reads 1e-3 as text."""
    small = f'{{config: {CONFIG}, metric: mIoU, options: {{optim_wrapper.optimizer.lr: 1e-3}}}}'
    text = f'tasks: {{a: {small}}}\nmethods: {{smart: }}\nblocks: [8x8]\nsparsities: [5e-1]\n'
    suite = read_suite(written(tmp_path, text + 'seeds: [0]'))
    assert suite.tasks['a'].options['optim_wrapper']['optimizer'] == {'lr': 0.001}
    assert suite.tasks['a'].sparsities == [0.5]


def test_a_mapping_may_be_merged_that_is_merged_itself_deeper_down(tmp_path):
    start = f'config: {CONFIG}, metric: mIoU, seeds: [0]'
    text = f"""
        tasks:
          a: {{{start}, options: {{x: &one {{lr: 1, end: 2}}, y: &two {{<<: *one, end: 3}}}}}}
          b: {{{start}, options: {{<<: *two}}}}
        methods: {{smart: }}
        blocks: [8x8]
        sparsities: [0.5]
    """
    suite = read_suite(written(tmp_path, text))
    assert suite.tasks['a'].options['y'] == suite.tasks['b'].options == {'lr': 1, 'end': 3}


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('seeds: [0]\nseeds: [1]', 'trial.yaml: seeds: given twice'),
        ('a: &a {b: 1}\nc: {<<: *a, d: 1, d: 2}', 'trial.yaml: d: given twice'),
        ('tasks: {', 'trial.yaml: is no YAML'),
        ('', 'trial.yaml: suite: expected a mapping, got None'),
    ],
)
def test_a_damaged_file_is_refused_by_its_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_suite(written(tmp_path, text))


def test_runs_at_a_time_share_the_cores_and_have_gpus_of_their_own(monkeypatch):
    monkeypatch.setattr('os.sched_getaffinity', lambda _: range(6))
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    assert [slot['OMP_NUM_THREADS'] for slot in environments(2, [], 1)] == ['3', '3']
    assert len(environments(None, [], 1)) == 6
    slots = environments(None, ['4', '5', '6', '7'], 2)
    assert [slot['CUDA_VISIBLE_DEVICES'] for slot in slots] == ['4,5', '6,7']
    assert not any('OMP_NUM_THREADS' in slot for slot in slots)
    shared = environments(3, ['4', '5'], 1)
    assert [slot['CUDA_VISIBLE_DEVICES'] for slot in shared] == ['4', '5', '4']
    with pytest.raises(ValueError, match='gpus-per-job: 8 asked for, and 2 are visible'):
        environments(None, ['0', '1'], 8)


def test_threads_that_the_user_has_set_stay(monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    assert not any('OMP_NUM_THREADS' in slot for slot in environments(2, [], 1))


def test_ports_count_up_from_that_of_the_user(monkeypatch):
    monkeypatch.setenv('PORT', '4000')
    assert [slot['PORT'] for slot in environments(2, [], 1)] == ['4000', '4001']
    monkeypatch.setenv('PORT', 'any')
    with pytest.raises(ValueError, match="PORT: expected a number such as 29500, got 'any'"):
        environments(2, [], 1)


def result(method, sparsity, seed, value, dense=70.0, task='small', block='8x8'):
    return Result(
        task, method, block, sparsity, seed, 'accuracy/top1', value, dense, sparsity, 0.3, 0.4, 12.5
    )


def results_of(values):
    """Results by method and sparsity, for seeds 0, 1, ...; None is missing."""
    return [
        result(method, sparsity, seed, value)
        for (method, sparsity), found in values.items()
        for seed, value in enumerate(found)
        if value is not None
    ]


def test_a_mean_has_the_deviation_of_a_sample():
    assert Mean.of([70.0, 71.0, 75.0]) == Mean(72.0, math.sqrt((4 + 1 + 9) / 2), 3)
    assert Mean.of([70.0]) == Mean(70.0, None, 1)
    assert Mean.of([]) is None


def test_runs_of_one_seed_count_once_in_the_dense_mean():
    results = [
        result('smart', 0.7, 0, 1.0, dense=60.0),
        result('taylor', 0.7, 0, 1.0, dense=62.0),
        result('smart', 0.7, 1, 1.0, dense=71.0),
    ]
    assert dense_mean(results) == Mean.of([61.0, 71.0])


def table(page, title):
    """Rows of the first table under a heading that begins so, as lists of their cells."""
    lines = page[page.index(f'\n## {title}') :].splitlines()
    rows = [line for line in lines if line.startswith('|')]
    end = next((i for i, row in enumerate(rows[2:], 2) if row.startswith('| run |')), len(rows))
    return [[cell.strip() for cell in row.strip('|').split('|')] for row in rows[:end]]


@pytest.fixture
def page():
    grid = content(methods={'smart': {}, 'magnitude': {}, 'taylor': {}}, blocks=['8x8'])
    del grid['tasks']['given']
    suite = suite_of(grid, 'trial')
    results = results_of(
        {
            ('smart', 0.7): [70.0, 71.0],
            ('magnitude', 0.7): [70.0, 70.0],
            ('taylor', 0.7): [99.0, None],
            ('smart', 0.9): [60.0, 62.0],
            ('magnitude', 0.9): [61.0, 61.0],
        }
    )
    missing = {'small/taylor/8x8/0.7/seed1': 'exit code 1: a | b', 'other': 'not run yet'}
    return markdown(suite, jobs_of(suite), results, missing)


def test_the_table_has_means_deviations_counts_and_gaps(page):
    header, _, *rows = table(page, 'small, blocks of 8x8')
    assert header == ['method', '0.7', '0.9']
    assert rows[:3] == [
        ['smart', '**70.50 ± 0.71 (2)**', '**61.00 ± 1.41 (2)**'],
        # A tie shares the honour; a lone seed does not win over two.
        ['magnitude', '70.00 ± 0.00 (2)', '**61.00 ± 0.00 (2)**'],
        ['taylor', '99.00 (1)', '–'],
    ]
    assert 'dense 70.00 ± 0.00 (2)' in page
    assert '9 of 12 runs are finished' in page


def test_the_page_says_what_is_missing_and_why(page):
    assert '| small/taylor/8x8/0.7/seed1 | exit code 1: a \\| b |' in page
    assert '1 runs were not made yet' in page


def test_cells_are_won_over_shared_seeds_and_only_if_nothing_is_missing(page):
    _, _, *rows = table(page, 'Where smart is above')
    assert rows == [
        ['small', '8x8', '0.7', '70.00 (1)', 'taylor', '99.00 (1)', '-29.00 (1)', 'no'],
        ['small', '8x8', '0.9', '', '', '', '', 'missing: taylor'],
    ]
    assert 'In **0 of 1** cells' in page and '1 of 2 cells are not counted' in page


@pytest.mark.parametrize(
    ('smart', 'other', 'is_won'),
    [([70.2, 70.4], [70.1, 70.3], True), ([70.1, 70.3], [70.2, 70.2], False), ([1], [2], False)],
)
def test_a_tie_is_no_win(smart, other, is_won):
    results = results_of({('smart', 0.7): smart, ('a', 0.7): other, ('b', 0.7): [0.0, 0.0]})
    (duel,) = duels(results, [('small', '8x8', 0.7)], ['smart', 'a', 'b'])
    assert duel.counts and duel.rival == 'a' and duel.is_won is is_won
    assert duel.margin.count == len(smart)


def test_results_are_a_row_a_run(tmp_path):
    results = [result('smart', 0.7, 0, 70.25), result('fixed, really', 0.7, 1, 69.5, dense=None)]
    save_csv(results, tmp_path / 'results.csv')
    with (tmp_path / 'results.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['method'] for row in rows] == ['smart', 'fixed, really']
    assert rows[0]['value'] == '70.25' and rows[0]['dense'] == '70.0' and rows[1]['dense'] == ''
    assert not list(tmp_path.glob('.*'))


def test_every_method_and_the_dense_network_show_in_the_picture(tmp_path):
    image = pytest.importorskip('matplotlib.image')
    methods = [f'method {i}' for i in range(11)]
    values = {(m, s): [50.0 + 3 * i - 20 * s, 51.0 + 3 * i - 20 * s]
              for i, m in enumerate(methods) for s in (0.7, 0.8, 0.9)}  # fmt: skip
    results = results_of(values)
    colours = []
    for count in (1, 11):
        mine = [r for r in results if r.method in methods[:count]]
        draw_curves(mine, methods, tmp_path / 'curves.png')
        pixels = (image.imread(tmp_path / 'curves.png')[..., :3] * 255).round().astype(int)
        flat = pixels.reshape(-1, 3) @ [65536, 256, 1]
        found, counts = np.unique(flat, return_counts=True)
        colours.append(set(found[counts > 100].tolist()))
        assert 102 * 65793 in colours[-1]  # the dense line's grey, 0.4
        assert 0 in colours[-1]  # the first method's black
    assert len(colours[1] - colours[0]) >= 10
    with pytest.raises(ValueError, match='none to draw'):
        draw_curves([], methods, tmp_path / 'curves.png')
