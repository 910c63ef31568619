// Functions that Python finds by name.
#pragma once

#define HG_API extern "C" __attribute__((visibility("default")))
