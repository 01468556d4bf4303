// What the library was made from, and for: megamoe_ep/kernels/library.py refuses it where that is
// not what it finds.
#include <tvm/ffi/tvm_ffi.h>

namespace {

tvm::ffi::String source_hash() { return MEGAMOE_SOURCE_HASH; }

// As "90a,100a".
tvm::ffi::String architectures() { return MEGAMOE_ARCHITECTURES; }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(source_hash, source_hash);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(architectures, architectures);
