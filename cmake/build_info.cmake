# _build_info.json beside the package, and the same text as a string for the extension.

function(json_string variable value)
  string(REPLACE "\\" "\\\\" value "${value}")
  string(REPLACE "\"" "\\\"" value "${value}")
  set(${variable} "\"${value}\"" PARENT_SCOPE)
endfunction()

function(json_list variable)
  set(quoted "")
  foreach(value IN LISTS ARGN)
    json_string(item "${value}")
    list(APPEND quoted "${item}")
  endforeach()
  list(JOIN quoted ", " joined)
  set(${variable} "[${joined}]" PARENT_SCOPE)
endfunction()

foreach(name IN ITEMS compiler openmp_version cuda_version reason remedy)
  if("${${name}}" STREQUAL "")
    set(json_${name} null)
  else()
    json_string(json_${name} "${${name}}")
  endif()
endforeach()
json_list(json_isa ${isas})
json_list(json_flags ${kernel_flags})
set(json_architectures null)
if(cuda_version)
  json_list(json_architectures ${TIM_CUDA_ARCHITECTURES})
endif()

set(build_info "{
  \"version\": \"${PROJECT_VERSION}\",
  \"compiler\": ${json_compiler},
  \"flags\": ${json_flags},
  \"isa\": ${json_isa},
  \"openmp\": ${json_openmp_version},
  \"cuda\": ${json_cuda_version},
  \"cuda_architectures\": ${json_architectures},
  \"reason\": ${json_reason},
  \"remedy\": ${json_remedy}
}
")
file(CONFIGURE OUTPUT _build_info.json CONTENT "${build_info}" @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/_build_info.json DESTINATION tim)
if(TARGET _C)
  file(CONFIGURE OUTPUT generated/build_info.h
       CONTENT "constexpr char kBuildInfo[] = R\"json(${build_info})json\";\n" @ONLY)
  target_include_directories(_C PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/generated)
endif()
