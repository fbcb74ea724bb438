"""wire/codec: objects to buffers and back, in one process (two processes: test_byvalue)."""

from __future__ import annotations

import ast
import copyreg
import gc
import pickle
import random
import subprocess
import sys
import threading
import time
import types
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest

from distpool import config
from distpool.errors import SerializationError
from distpool.wire import codec

LARGE = config.OUT_OF_BAND


def roundtrip(obj, **options):
    data, buffers = codec.encode(obj, **options)
    return codec.decode(data, [bytearray(buffer) for buffer in buffers])


class Unpicklable:
    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


class Counting:
    """Notes how often it was pickled."""

    def __init__(self):
        self.times = 0

    def __reduce__(self):
        self.times += 1
        raise ValueError("always")


class Handle:
    """Stands for a library object such as a reference."""

    def __init__(self, name):
        self.name = name


def rebuild_handle(name, peer):
    handle = Handle(name)
    handle.peer = peer
    return handle


@pytest.fixture
def handle_reducer():
    codec.register_reducer(Handle, lambda handle, peer: (rebuild_handle, (handle.name, peer)))
    yield
    codec.unregister_reducer(Handle)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -1,
        1 << 5000,
        1.5,
        2j,
        "",
        "\ud800",
        b"\0" * 10,
        "__main__",
        (),
        [1, [2]],
        {"a": {1, 2}},
        ...,
        int,
    ],
)
def test_values_survive(value):
    assert roundtrip(value) == value
    assert codec.decode_args(*codec.encode_args((value,), {})) == ((value,), {})


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((1, "a"), {}), (([1],), {}), ((), {"x": 1}), ((1, [2]), {"self": 3, "fn": [4]})]
)
def test_arguments_survive(args, kwargs):
    data, buffers = codec.encode_args(args, kwargs)
    assert codec.decode_args(data, buffers) == (args, kwargs)


def test_an_only_argument_may_be_anything_that_looks_like_the_encoding():
    for value in ([(1,), {}], ((1,), {}), [[], {}]):
        assert codec.decode_args(*codec.encode_args((value,), {})) == ((value,), {})


def test_bool_and_int_stay_apart():
    (one, true), _ = codec.decode_args(*codec.encode_args((1, True), {}))
    assert type(one) is int and true is True


@pytest.mark.parametrize("order", ["C", "F"])
def test_large_arrays_go_out_of_band_without_a_copy(order):
    array = np.asarray(np.arange(LARGE, dtype=np.float64).reshape(-1, 64), order=order)
    data, buffers = codec.encode({"x": array})
    assert len(data) < 1000
    assert [(view.format, view.ndim, view.nbytes, view.contiguous) for view in buffers] == [
        ("B", 1, array.nbytes, True)
    ]
    assert np.shares_memory(np.frombuffer(buffers[0], np.uint8), array)
    received = bytearray(buffers[0])
    back = codec.decode(data, [received])["x"]
    assert np.array_equal(back, array) and back.flags["WRITEABLE"]
    assert back.flags[f"{order}_CONTIGUOUS"]
    assert np.shares_memory(np.frombuffer(received, np.uint8), back)


def test_what_is_smaller_or_in_pieces_goes_in_band():
    small = np.zeros(LARGE // 8 - 1)
    pieces = np.zeros((LARGE, 2))[:, 0]
    for array in (small, pieces):
        data, buffers = codec.encode(array)
        assert buffers == [] and len(data) >= array.nbytes
        assert np.array_equal(codec.decode(data), array)
    assert len(codec.encode(np.zeros(LARGE // 8))[1]) == 1


def test_a_buffer_in_pieces_is_a_serialization_error():
    with pytest.raises(SerializationError):
        codec.encode(pickle.PickleBuffer(memoryview(bytearray(8))[::2]))


def test_several_buffers_keep_their_order():
    arrays = [np.full(LARGE, number, np.uint8) for number in range(4)]
    (back,), _ = codec.decode_args(*codec.encode_args((arrays,), {}))
    assert [array[0] for array in back] == [0, 1, 2, 3]


def test_one_object_in_one_message_stays_one_object():
    array, inner = np.zeros(LARGE), [1]
    data, buffers = codec.encode([array, array, inner, inner])
    assert len(buffers) == 1
    back = codec.decode(data, buffers)
    assert back[0] is back[1] and back[2] is back[3]


def test_messages_share_no_memo():
    inner = [1]
    assert codec.encode(inner)[0] == codec.encode(inner)[0]


def test_functions_and_classes_without_a_name_travel_by_value():
    class Local:
        def __init__(self, x):
            self.x = x

        def double(self):
            return self.x * 2

    function, made = roundtrip([lambda x: x + 1, Local(4)])
    assert function(1) == 2
    assert type(made) is Local and made.double() == 8


def test_buffers_of_the_first_attempt_are_dropped_when_cloudpickle_takes_over():
    array = np.zeros(LARGE)
    data, buffers = codec.encode([array, lambda: 1])
    assert len(buffers) == 1
    assert np.array_equal(codec.decode(data, buffers)[0], array)


def test_state_travels_as_it_is_now():
    generator = random.Random(5)
    first, expected = roundtrip(generator), random.Random(5)
    assert first.random() == expected.random()
    generator.random()
    assert roundtrip(generator).random() == expected.random()


def test_names_of_builtins_and_modules_are_the_same_objects():
    assert roundtrip([int, len, np.sum, np.sqrt, str.upper, codec]) == [int, len, np.sum, np.sqrt, str.upper, codec]
    assert codec.decode(codec.encode(lambda: (int, np, codec))[0])() == (int, np, codec)


def test_modules_registered_by_value_are_honoured():
    import cloudpickle

    module = types.ModuleType("registered_module")
    exec("factor = 3\ndef triple(x):\n    return x * factor", vars(module))
    sys.modules["registered_module"] = module
    try:
        cloudpickle.register_pickle_by_value(module)
        try:
            data, _ = codec.encode(module.triple)
        finally:
            cloudpickle.unregister_pickle_by_value(module)
    finally:
        del sys.modules["registered_module"]
    assert codec.decode(data)(2) == 6


@pytest.mark.parametrize("value", [threading.Lock(), (i for i in ()), zlib.compressobj(), [1, [threading.Lock()]]])
def test_what_cannot_travel_is_named(value):
    with pytest.raises(SerializationError) as caught:
        codec.encode(value, what="the result of f")
    assert isinstance(caught.value, pickle.PicklingError)
    assert isinstance(caught.value.__cause__, TypeError)
    assert str(caught.value).startswith("the result of f, ")
    assert str(caught.value.__cause__) in str(caught.value)


def test_an_open_file_is_named(tmp_path):
    text = "^the result of f, an object of type _io.TextIOWrapper, cannot be serialised: PicklingError: .* reading"
    with open(tmp_path / "file", "w") as file, pytest.raises(SerializationError, match=text) as caught:
        codec.encode(file, what="the result of f")
    assert isinstance(caught.value.__cause__, pickle.PicklingError)


def test_the_failing_argument_is_named():
    with pytest.raises(SerializationError, match=r"argument 2, .*_thread.lock.* cannot be serialised: TypeError"):
        codec.encode_args((1, threading.Lock(), [2]), {})
    with pytest.raises(SerializationError, match="argument 'key', a list of 1, cannot be serialised"):
        codec.encode_args((1,), {"other": 2, "key": [threading.Lock()]})


def test_the_failing_element_of_a_chunk_is_named():
    lock = threading.Lock()
    text = r"^argument 1 of element 2 of a chunk of 2, an object of type _thread.lock, cannot be serialised: TypeError"
    with pytest.raises(SerializationError, match=text) as caught:
        codec.encode_chunk([1, lock], single=True)
    assert isinstance(caught.value, TypeError), "as the standard library's"
    with pytest.raises(SerializationError, match="^argument 2 of element 3 of a chunk of 3, .*lock"):
        codec.encode_chunk([(1, 2), (3, 4), (5, lock)], single=False)
    with pytest.raises(SerializationError, match="^a list of 1 cannot be serialised: MemoryError"):
        codec.encode_chunk([Unpicklable(MemoryError())], single=True)
    assert codec.decode(*codec.encode_chunk([(1, [2]), (3, [4])], single=False)) == [(1, [2]), (3, [4])]


def test_errors_of_arguments_are_the_original_ones_too():
    with pytest.raises(NotImplementedError, match="^argument 1, .*cannot be serialised") as caught:
        codec.encode_args((Unpicklable(NotImplementedError("no")),), {})
    assert isinstance(caught.value, SerializationError)
    assert type(pickle.loads(pickle.dumps(caught.value))) is SerializationError


def test_what_an_object_is_can_be_said_later():
    with pytest.raises(SerializationError) as caught:
        codec.encode(threading.Lock())
    named = codec.about(caught.value, threading.Lock(), "the result of f")
    assert str(named).startswith("the result of f, an object of type _thread.lock, cannot be")
    assert named.__cause__ is caught.value.__cause__
    other = ValueError()
    assert codec.about(other, 1, "x") is other


@pytest.mark.parametrize(
    "error", [ValueError("mine"), KeyError(1), SystemExit(3), MemoryError(), RecursionError("deep"), GeneratorExit()]
)
def test_errors_of_user_code_are_mapped(error):
    for attempt in (lambda: codec.encode([Unpicklable(error)]), lambda: codec.encode_args((Unpicklable(error),), {})):
        with pytest.raises(SerializationError) as caught:
            attempt()
        assert caught.value.__cause__ is error
        assert type(error).__name__ in str(caught.value)


def test_an_interrupt_is_not_a_serialization_error():
    with pytest.raises(KeyboardInterrupt):
        codec.encode(Unpicklable(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        codec.encode_args((Unpicklable(KeyboardInterrupt()),), {})


def test_user_code_with_an_error_of_its_own_runs_once():
    counting = Counting()
    with pytest.raises(SerializationError):
        codec.encode(counting)
    assert counting.times == 1


def test_endless_nesting_is_a_serialization_error():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(SerializationError) as caught:
        codec.encode(deep)
    assert isinstance(caught.value.__cause__, RecursionError)
    while deep:  # taken apart by hand: the interpreter would recurse too
        deep = deep[0]


def test_describing_runs_no_code_of_the_user():
    class Shy:
        def __repr__(self):
            raise AssertionError("repr was called")

        def __str__(self):
            raise AssertionError("str was called")

    assert "Shy" in codec.describe(Shy())
    assert codec.describe([1, 2]) == "a list of 2"
    assert len(codec.describe("x" * 10**6)) < 100
    assert codec.describe(10**10000) == "an int"
    assert "len" in codec.describe(len)


def test_an_error_whose_text_raises_is_still_mapped():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no")

    with pytest.raises(SerializationError, match="Mute"):
        codec.encode(Unpicklable(Mute()))


def test_reducers_see_the_peer_and_report(handle_reducer):
    handle, seen = Handle("h"), []
    data, _ = codec.encode([handle, handle], 7, seen)
    assert seen == [handle]
    back = codec.decode(data)
    assert back[0].peer == 7 and back[0] is back[1]


def test_reducers_work_inside_closures_and_report_once(handle_reducer):
    handle, seen = Handle("h"), []
    data, _ = codec.encode([handle, lambda: handle], 3, seen)
    assert seen == [handle]
    back, function = codec.decode(data)
    assert function() is back and back.peer == 3


def test_seen_keeps_what_the_caller_had_in_it(handle_reducer):
    seen = ["before"]
    codec.encode_args((Handle("h"), lambda: 1), {}, 1, seen)
    assert seen[0] == "before" and len(seen) == 2


def test_reducers_count_in_distpool_messages_only(handle_reducer):
    assert not hasattr(pickle.loads(pickle.dumps(Handle("h"))), "peer")


def test_threads_with_different_peers_do_not_mix(handle_reducer):
    wrong = []

    def work(peer):
        for _ in range(300):
            for message in (Handle("h"), [lambda: 0, Handle("h")]):
                back = roundtrip(message, peer=peer)
                if (back if isinstance(back, Handle) else back[1]).peer != peer:
                    wrong.append(peer)

    threads = [threading.Thread(target=work, args=(peer,)) for peer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_decode_raises_what_loading_raises():
    data = pickle.dumps(len).replace(b"builtins", b"nomodule")
    with pytest.raises(ModuleNotFoundError):
        codec.decode(data)
    with pytest.raises(pickle.UnpicklingError):
        codec.decode(b"\x80\x05K")
    with pytest.raises(pickle.UnpicklingError):
        codec.decode(codec.encode(np.zeros(LARGE))[0], [])


def test_decode_takes_any_buffer():
    assert codec.decode(memoryview(bytearray(codec.encode([1])[0]))) == [1]


def test_scalars_take_microseconds():
    # Generous (0.5 us measured): this catches a second pickler on the path, not a slow or busy machine.
    start = time.thread_time()
    for _ in range(10_000):
        codec.encode_args((1,), {})
    assert time.thread_time() - start < 0.2


def test_importing_the_codec_is_cheap_and_loads_no_cloudpickle():
    code = (
        "import sys, distpool; before = set(sys.modules);"
        "import distpool.wire.codec, distpool.wire.functions, distpool.wire.failures;"
        "from distpool.wire import codec; codec.encode([1, {}]); codec.encode_args((1, [2]), {});"
        "print(sorted({'cloudpickle', 'threading', 'socket', 'traceback', 'dis'} & (set(sys.modules) - before)))"
    )
    root = Path(codec.__file__).parents[2]
    command = [sys.executable, "-S", "-c", code]  # -S: .pth files of the environment may import anything
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30, check=True)
    assert ast.literal_eval(done.stdout) == []


def _read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("encode", [codec.encode, lambda array: _by_value(array)], ids=["reference", "value"])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(10.0),
        np.arange(2.0 * LARGE),
        np.zeros(0),
        np.zeros((2, 0, 3)),
        np.array(5.0),
        np.asfortranarray(np.arange(12).reshape(3, 4)),
        np.arange(LARGE).reshape(2, -1).T,
        np.arange(20)[::2],
        np.arange(20)[::-1],
        np.array([1, "a", None], object),
        np.array([(1, 2.0)], "i4,f8"),
        np.array(["2020-01-01"], "M8[D]"),
        np.array(["text", "t"]),
        np.arange(4, dtype=">i2"),
        np.arange(3).view(np.recarray),
    ],
    ids=lambda array: f"{type(array).__name__}-{array.dtype}-{array.shape}",
)
def test_a_read_only_array_arrives_as_a_copy_that_may_be_written_to(array, encode):
    array = _read_only(array[...])
    data, buffers = encode([array, array])
    assert all(buffer.nbytes >= LARGE for buffer in buffers)
    back, again = codec.decode(data, [bytearray(buffer) for buffer in buffers])
    assert back is again and back.flags.writeable and not array.flags.writeable
    assert (type(back), back.dtype, back.shape) == (type(array), array.dtype, array.shape)
    assert back.tolist() == array.tolist()
    assert back.flags.f_contiguous == array.flags.f_contiguous or not array.flags.f_contiguous


def _by_value(obj):
    buffers: list[memoryview] = []
    return codec.dump_by_value(obj, None, None, buffers), buffers


def test_arrays_of_a_file_arrive_as_copies_that_may_be_written_to(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(2.0 * LARGE))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    for array in (mapped, np.asarray(mapped), np.frombuffer(b"abc" * LARGE, "u1")):
        back = roundtrip(array)
        assert back.flags.writeable and (back == array).all()


def test_the_buffers_of_a_read_only_array_keep_its_memory():
    array = _read_only(np.arange(2.0 * LARGE))
    ended = weakref.ref(array)
    data, buffers = codec.encode(array)
    del array
    assert ended() is not None and len(buffers) == 1
    assert (codec.decode(data, [bytearray(buffers[0])]) == np.arange(2.0 * LARGE)).all()
    del buffers
    gc.collect()
    assert ended() is None


def test_how_the_user_has_arrays_pickled_counts(monkeypatch):
    monkeypatch.setitem(copyreg.dispatch_table, np.ndarray, lambda array: (list, (array.tolist(),)))
    assert roundtrip([_read_only(np.arange(3))]) == [[0, 1, 2]]
    assert codec.decode(_by_value([np.arange(3)])[0]) == [[0, 1, 2]]
