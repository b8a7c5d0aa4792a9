"""A bare llama_context with a watched graph, for looking at what llama.cpp itself computes."""

import ctypes

import llama_cpp.llama_cpp as C
import numpy as np

_lib = C._lib


def _fn(name, result, *args):
    f = getattr(_lib, name)
    f.restype, f.argtypes = result, args
    return f


get_name = _fn("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p)
get_data = _fn("ggml_get_data", ctypes.c_void_p, ctypes.c_void_p)
n_elements = _fn("ggml_nelements", ctypes.c_int64, ctypes.c_void_p)
is_contiguous = _fn("ggml_is_contiguous", ctypes.c_bool, ctypes.c_void_p)


class Context:
    """``watch(name, values)`` is called with every F32 node whose name starts with one of ``names``, flat."""

    def __init__(self, path, n_ctx, *, flash_attn, n_threads=2, names=(), watch=None, type_k=1, type_v=1):
        C.llama_backend_init()
        model_params = C.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = C.llama_model_load_from_file(str(path).encode(), model_params)
        params = C.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 512, 512
        params.n_threads = params.n_threads_batch = n_threads
        params.offload_kqv = False
        params.type_k, params.type_v = type_k, type_v
        params.flash_attn_type = C.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else C.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._callback = C.ggml_backend_sched_eval_callback(self._on_node)
        if watch is not None:
            params.cb_eval = self._callback
        self.names, self.watch = names, watch
        self.ctx = C.llama_init_from_model(self.model, params)
        self.n_past = 0

    def _on_node(self, tensor, ask, _user):
        name = get_name(tensor).decode()
        wanted = name.startswith(tuple(self.names))
        if ask or not wanted:
            return wanted if ask else True
        n = n_elements(tensor)
        assert is_contiguous(tensor), name
        data = np.ctypeslib.as_array(ctypes.cast(get_data(tensor), ctypes.POINTER(ctypes.c_float)), shape=(n,))
        self.watch(name, data.copy())
        return True

    def decode(self, tokens):
        array = (C.llama_token * len(tokens))(*tokens)
        assert C.llama_decode(self.ctx, C.llama_batch_get_one(array, len(tokens))) == 0
        self.n_past += len(tokens)

    def close(self):
        C.llama_free(self.ctx)
        C.llama_model_free(self.model)
