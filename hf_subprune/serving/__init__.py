"""A saved model as other runtimes read it: GGUF for llama.cpp, block configs for vLLM, ONNX.

Takes the folder of a saved model, stock or ragged; gives a file or a folder that another runtime takes, in the form
that it has for widths that differ by layer, or the reason why it has none.
"""
