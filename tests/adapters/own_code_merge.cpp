// Merges an adapter into a model by adapter-merge.h of acestep.cpp or, with -DHOT_STEP, of HOT-Step, and writes every
// weight as fp32, in the model's order: own_code_merge MODEL.gguf ADAPTER OUTPUT
#include "adapter-merge.h"
#include "ggml-cpu.h"

int main(int argc, char ** argv) {
    GGUFModel model;
    if (argc != 4 || !gf_load(&model, argv[1])) {
        return 2;
    }
    int64_t   count = gguf_get_n_tensors(model.gguf);
    WeightCtx weights;
    wctx_init(&weights, (int) count + 8);
    std::vector<struct ggml_tensor *> tensors;
    for (int64_t i = 0; i < count; i++) {
        tensors.push_back(gf_load_tensor(&weights, model, gguf_get_tensor_name(model.gguf, i)));
    }
    ggml_backend_t backend = ggml_backend_cpu_init();
#ifdef HOT_STEP
    WeightSource source;
    source.gf   = &model;
    bool merged = adapter_merge(&weights, source, argv[2], 1.0f, backend);
#else
    bool merged = adapter_merge(&weights, model, argv[2], 1.0f, backend);
#endif
    if (!wctx_alloc(&weights, backend)) {
        return 3;
    }
    FILE * output = fopen(argv[3], "wb");
    for (struct ggml_tensor * tensor : tensors) {
        std::vector<float> values((size_t) ggml_nelements(tensor));
        if (tensor->type != GGML_TYPE_F32) {
            return 4;
        }
        ggml_backend_tensor_get(tensor, values.data(), 0, ggml_nbytes(tensor));
        fwrite(values.data(), sizeof(float), values.size(), output);
    }
    fclose(output);
    return merged ? 0 : 1;
}
