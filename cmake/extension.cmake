# The target _C: CPU kernels once per instruction set, CUDA kernels where nvcc is, Python bindings.

enable_language(CXX)
include(CheckCXXCompilerFlag)
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(compiler "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
if(NOT CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  message(FATAL_ERROR "the kernels need GCC or Clang, found ${compiler}; set CXX")
endif()

include(cmake/pybind11.cmake)
find_package(OpenMP COMPONENTS CXX)

# NaN and infinity stay visible and sums keep their order except where the code says `omp simd`:
# no -ffast-math.
set(kernel_flags -O3 -fopenmp-simd -fno-math-errno -fno-trapping-math -ffp-contract=fast)
set(kernel_sources csrc/cpu/adaln.cpp csrc/cpu/attention.cpp csrc/cpu/attention_backward.cpp
    csrc/cpu/interpolate.cpp csrc/cpu/qk_norm_rope.cpp
    csrc/cpu/swiglu.cpp csrc/cpu/transition_loss.cpp)

pybind11_add_module(_C MODULE NO_EXTRAS csrc/bindings.cpp csrc/cpu/dispatch.cpp csrc/cpu/runtime.cpp)
target_link_options(_C PRIVATE $<$<AND:$<CONFIG:Release>,$<PLATFORM_ID:Linux>>:-s>)

function(add_cpu_kernels isa)
  add_library(tim_${isa} OBJECT ${kernel_sources})
  target_compile_definitions(tim_${isa} PRIVATE TIM_ISA=${isa})
  target_compile_options(tim_${isa} PRIVATE ${kernel_flags} ${ARGN})
  if(OpenMP_CXX_FOUND)
    target_link_libraries(tim_${isa} PRIVATE OpenMP::OpenMP_CXX)
  endif()
  target_link_libraries(_C PRIVATE tim_${isa})
  list(APPEND isas ${isa})
  set(isas ${isas} PARENT_SCOPE)
endfunction()

add_cpu_kernels(baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  add_cpu_kernels(avx2 -mavx2 -mfma)
  add_cpu_kernels(avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma
                  -mprefer-vector-width=512)
  target_compile_definitions(_C PRIVATE TIM_X86_KERNELS)
  check_cxx_compiler_flag(-mavx512bf16 TIM_HAS_AVX512BF16)
  if(TIM_HAS_AVX512BF16)
    add_cpu_kernels(avx512bf16 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mfma
                    -mprefer-vector-width=512)
    target_compile_definitions(_C PRIVATE TIM_AVX512BF16_KERNELS)
  endif()
endif()
if(OpenMP_CXX_FOUND)
  set(openmp_version ${OpenMP_CXX_VERSION})
  target_link_libraries(_C PRIVATE OpenMP::OpenMP_CXX)
else()
  note_missing("OpenMP was not found: the CPU kernels use one thread"
               "install the OpenMP library of your compiler, then install this package again")
endif()

file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cu)
if(cuda_sources AND NOT TIM_CUDA STREQUAL "OFF")
  include(cmake/cuda.cmake)
elseif(TIM_CUDA STREQUAL "ON")
  message(FATAL_ERROR "TIM_CUDA=ON, but this source tree holds no CUDA kernels")
elseif(cuda_sources)
  note_missing("the CUDA kernels were left out (TIM_CUDA=OFF)"
               "for a GPU install this package again with TIM_CUDA=AUTO and nvcc (CUDA toolkit) there")
endif()

install(TARGETS _C DESTINATION tim)
