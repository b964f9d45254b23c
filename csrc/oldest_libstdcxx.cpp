// What the compiler's headers take from a libstdc++ and a glibc newer than those that torch asks
// for: own definitions, which the linker finds first. Hidden, so that no other library sees them.

#include <ios>

#if defined(__GLIBC__) && defined(__GLIBCXX__) && _GLIBCXX_USE_CXX11_ABI

#define GPL_FAST_STREAM "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1"
#define GPL_FAST_OSTREAM "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1"
#define GPL_FAST_HIDDEN __attribute__((visibility("hidden")))

extern "C" {

// Default constructors of string streams, GLIBCXX_3.4.26: by those that take a mode, as before
// GCC 9.
void stream_of(void* self,
               std::ios_base::openmode mode) __asm__(GPL_FAST_STREAM "ESt13_Ios_Openmode");
GPL_FAST_HIDDEN void stream(void* self) __asm__(GPL_FAST_STREAM "Ev");
void stream(void* self) { stream_of(self, std::ios_base::in | std::ios_base::out); }

void ostream_of(void* self,
                std::ios_base::openmode mode) __asm__(GPL_FAST_OSTREAM "ESt13_Ios_Openmode");
GPL_FAST_HIDDEN void ostream(void* self) __asm__(GPL_FAST_OSTREAM "Ev");
void ostream(void* self) { ostream_of(self, std::ios_base::out); }

// GLIBC_2.32. False: reference counts are atomic, as they were in every program with threads.
GPL_FAST_HIDDEN extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}

#endif
