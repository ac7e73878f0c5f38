// A stand-in for ONNX Runtime's CUDA provider: a library that depends on a cuBLAS.
extern "C" int cublasGemmEx();

extern "C" void* provider_uses() { return reinterpret_cast<void*>(&cublasGemmEx); }
