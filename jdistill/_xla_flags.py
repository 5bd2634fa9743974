"""The XLA flag for convolutions on CPU: `runtime` sets it, `nets` looks whether it is set."""

CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
# Lone convolutions go to Eigen, not to the YNN library, which is slow at them.
CPU_FLAG_VALUE = "-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
