// The kernels of kernels.h as functions of a Python module, under their names.
//
// Nothing of torch is compiled in, so that one build serves every torch.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace tim {

// Of an array in memory; in Python an integer, None for an absent array, or whatever tells its
// address by a method data_ptr(), as tensors do.
struct Address {
    std::uintptr_t value;
};

}  // namespace tim

template <>
struct pybind11::detail::type_caster<tim::Address> {
    PYBIND11_TYPE_CASTER(tim::Address, const_name("Tensor | int | None"));

    bool load(handle source, bool) {
        if (source.is_none()) {
            value.value = 0;
            return true;
        }
        object address;
        if (!PyLong_Check(source.ptr())) {
            static PyObject* const method = PyUnicode_InternFromString("data_ptr");
            address = reinterpret_steal<object>(PyObject_CallMethodNoArgs(source.ptr(), method));
            if (!address) throw error_already_set();
            source = address;
        }
        value.value = PyLong_AsSize_t(source.ptr());
        if (PyErr_Occurred()) throw error_already_set();
        return true;
    }
};

namespace tim {

// Strides are tuples of three in Python, numbers are themselves.
template <class A>
using PythonType =
    std::conditional_t<std::is_pointer_v<A>, Address,
                       std::conditional_t<std::is_same_v<A, Strides>, std::array<int64_t, 3>, A>>;

template <class A>
A native(PythonType<A> value) {
    if constexpr (std::is_pointer_v<A>) {
        return reinterpret_cast<A>(value.value);
    } else if constexpr (std::is_same_v<A, Strides>) {
        return {value[0], value[1], value[2]};
    } else {
        return value;
    }
}

// What `check` looks at; of strides there is nothing to check.
inline int64_t checked(Address address) { return static_cast<int64_t>(address.value); }
inline int64_t checked(const std::array<int64_t, 3>&) { return 0; }

template <class Number>
int64_t checked(Number value) {
    return static_cast<int64_t>(value);
}

struct Parameter {
    std::string name;
    bool nullable;
    bool size;
};

// "x y? n#": y may be a null pointer, n is a size.
inline std::vector<Parameter> parse(const char* signature) {
    std::vector<Parameter> parameters;
    std::istringstream words(signature);
    for (std::string word; words >> word;) {
        const char mark = word.back();
        if (mark == '?' || mark == '#') word.pop_back();
        parameters.push_back({word, mark == '?', mark == '#'});
    }
    return parameters;
}

// The last line of defence behind the checks in tim.ops: a null pointer is only right where the
// signature says so, or where there is nothing to point at because a size is zero.
template <size_t count>
void check(const char* kernel, const std::vector<Parameter>& parameters,
           const std::array<int64_t, count>& values, const std::array<bool, count>& is_pointer) {
    bool empty = false;
    for (size_t i = 0; i < count; ++i) {
        if (!parameters[i].size) continue;
        if (values[i] < 0) {
            throw std::invalid_argument(std::string(kernel) + ": " + parameters[i].name +
                                        " must not be negative, got " + std::to_string(values[i]));
        }
        empty = empty || values[i] == 0;
    }
    for (size_t i = 0; i < count && !empty; ++i) {
        if (is_pointer[i] && values[i] == 0 && !parameters[i].nullable) {
            throw std::invalid_argument(std::string(kernel) + ": " + parameters[i].name +
                                        " must be the address of an array, got 0");
        }
    }
}

template <class... A, size_t... I>
void define(py::module_& module, const char* name, void (*kernel)(A...),
            std::vector<Parameter> parameters, std::index_sequence<I...>) {
    const auto call = [=](PythonType<A>... arguments) {
        check<sizeof...(A)>(name, parameters, {checked(arguments)...}, {std::is_pointer_v<A>...});
        kernel(native<A>(arguments)...);
    };
    module.def(name, call, py::arg(parameters[I].name.c_str())...,
               py::call_guard<py::gil_scoped_release>());
}

template <class... A>
void define(py::module_& module, const char* name, void (*kernel)(A...), const char* signature) {
    if (kernel == nullptr) return;
    std::vector<Parameter> parameters = parse(signature);
    if (parameters.size() != sizeof...(A)) {
        throw std::logic_error(std::string(name) + ": signature and kernel differ");
    }
    define(module, name, kernel, std::move(parameters), std::index_sequence_for<A...>{});
}

inline void define_kernels(py::module_ m, const Kernels& k) {
    define(m, "interpolate", k.interpolate, "x z coefficients a b batch# n# dtype where");
    define(m, "swiglu", k.swiglu, "gate gate_stride up up_stride out rows# cols# dtype where");
    define(m, "swiglu_backward", k.swiglu_backward,
           "grad gate gate_stride up up_stride dgate dup rows# cols# dtype where");
    define(m, "swiglu_tangent", k.swiglu_tangent,
           "gate gate_stride up up_stride tgate? tgate_stride tup? tup_stride out tout "
           "rows# cols# dtype where");
    define(m, "adaln", k.adaln,
           "x y? gate? shift scale res? out mean? rstd? batch# tokens# channels# "
           "gate_stride shift_stride scale_stride eps dtype where");
    define(m, "adaln_backward", k.adaln_backward,
           "dout dres? res y? gate? scale mean rstd dx dy? dgate? dshift dscale sums? "
           "batch# tokens# channels# chunks gate_stride scale_stride eps dtype where");
    define(m, "adaln_tangent", k.adaln_tangent,
           "x y? gate? shift scale tx? ty? tgate? tshift? tscale? res? out tres? tout mean? rstd? "
           "batch# tokens# channels# gate_stride shift_stride scale_stride "
           "tgate_stride tshift_stride tscale_stride eps dtype where");
    define(m, "qk_norm_rope", k.qk_norm_rope,
           "qkv q_weight q_bias k_weight k_bias cos sin q k v batch# tokens# heads# head_dim# "
           "stride_b stride_n eps dtype where");
    define(m, "qk_norm_rope_backward", k.qk_norm_rope_backward,
           "gq gk gv qkv q_weight k_weight cos sin dqkv dq_weight dq_bias dk_weight dk_bias "
           "batch# tokens# heads# head_dim# stride_b stride_n eps dtype where");
    define(m, "qk_norm_rope_tangent", k.qk_norm_rope_tangent,
           "qkv tqkv q_weight q_bias k_weight k_bias cos sin q k v tq tk tv "
           "batch# tokens# heads# head_dim# stride_b stride_n tstride_b tstride_n eps dtype where");
    define(m, "attention", k.attention,
           "q k v cu_seqlens_q? cu_seqlens_k? out lse q_strides k_strides v_strides "
           "batch# n# m# heads# head_dim# sequences max_n max_m scale dtype where");
    define(m, "attention_hopper", k.attention_hopper,
           "q k v cu_seqlens_q? cu_seqlens_k? out lse q_strides k_strides v_strides "
           "batch# n# m# heads# head_dim# sequences max_n max_m scale dtype where");
    define(m, "attention_backward", k.attention_backward,
           "dout q k v out lse cu_seqlens_q? cu_seqlens_k? delta? dq dk dv "
           "q_strides k_strides v_strides "
           "batch# n# m# heads# head_dim# sequences max_n max_m scale dtype where");
    define(m, "attention_tangent", k.attention_tangent,
           "q k v out lse t_q? t_k? t_v? cu_seqlens_q? cu_seqlens_k? t_out t_lse? "
           "q_strides k_strides v_strides t_q_strides t_k_strides t_v_strides "
           "batch# n# m# heads# head_dim# sequences max_n max_m scale dtype where");
    define(m, "attention_tangent_hopper", k.attention_tangent_hopper,
           "q k v out lse t_q? t_k? t_v? cu_seqlens_q? cu_seqlens_k? t_out t_lse? "
           "q_strides k_strides v_strides t_q_strides t_k_strides t_v_strides "
           "batch# n# m# heads# head_dim# sequences max_n max_m scale dtype where");
    define(m, "attention_dual", k.attention_dual,
           "q k v t_q? t_k? t_v? cu_seqlens_q? cu_seqlens_k? out lse t_out t_lse? "
           "q_strides k_strides v_strides t_q_strides t_k_strides t_v_strides "
           "batch# n# m# heads# head_dim# sequences max_n max_m scale dtype where");
    define(m, "attention_dual_hopper", k.attention_dual_hopper,
           "q k v t_q? t_k? t_v? cu_seqlens_q? cu_seqlens_k? out lse t_out t_lse? "
           "q_strides k_strides v_strides t_q_strides t_k_strides t_v_strides "
           "batch# n# m# heads# head_dim# sequences max_n max_m scale dtype where");
    define(
        m, "transition_loss", k.transition_loss,
        "F x z d? d_minus? cond? null? coefficients epsilon time_weight first target loss "
        "denoising weight sums? batch# channels# positions# parts cosine dtype data_dtype where");
    define(m, "transition_loss_backward", k.transition_loss_backward,
           "scale F target dF batch# channels# positions# cosine dtype data_dtype where");
}

}  // namespace tim
