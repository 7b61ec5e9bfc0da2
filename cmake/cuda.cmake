# CUDA kernels into _C. The usual installer leaves nvcc out of PATH, hence the search.

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(TIM_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
               PATH_SUFFIXES bin)
  if(TIM_NVCC)
    set(CMAKE_CUDA_COMPILER ${TIM_NVCC})
  endif()
endif()
if(NOT CMAKE_CUDA_COMPILER)
  check_language(CUDA)
endif()

if(CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_ARCHITECTURES ${TIM_CUDA_ARCHITECTURES})  # before the language is enabled
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  # Static: one binary for machines with any CUDA runtime or none.
  set_target_properties(_C PROPERTIES
    CUDA_ARCHITECTURES "${TIM_CUDA_ARCHITECTURES}"
    CUDA_RUNTIME_LIBRARY Static
    CUDA_VISIBILITY_PRESET hidden)
  target_sources(_C PRIVATE ${cuda_sources})
  target_compile_definitions(_C PRIVATE TIM_HAS_CUDA)
  if(TIM_CUDA_ARCHITECTURES MATCHES "90a")
    target_compile_definitions(_C PRIVATE TIM_SM90A)  # for the kernels that only 9.0 has
  endif()
  set(cuda_version ${CMAKE_CUDA_COMPILER_VERSION})
elseif(TIM_CUDA STREQUAL "ON")
  message(FATAL_ERROR "TIM_CUDA=ON, but nvcc was not found; put it into PATH or set CUDACXX")
else()
  note_missing("nvcc was not found: the extension holds no CUDA kernels"
               "for a GPU install the CUDA toolkit (nvcc), then install this package again")
endif()
