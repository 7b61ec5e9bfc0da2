# pybind11, wherever pip or the environment variable pybind11_DIR has put it.

if(NOT pybind11_DIR AND NOT DEFINED ENV{pybind11_DIR})
  execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
                  OUTPUT_VARIABLE pybind11_from_python OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  list(APPEND CMAKE_PREFIX_PATH ${pybind11_from_python})
endif()
find_package(pybind11 2.13 CONFIG)
if(NOT pybind11_FOUND)
  message(FATAL_ERROR "pybind11 was not found: pip install pybind11, or set the environment variable "
                      "pybind11_DIR to the folder that holds pybind11Config.cmake")
endif()
