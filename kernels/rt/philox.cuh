// Philox4x32-10 (Salmon et al. 2011), as src/random.rs has it.
#pragma once

#include "kernel.cuh"

struct Philox4 {
    uint32_t word[4];
};

DEVICE Philox4 philox4x32(Philox4 counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t low = static_cast<uint64_t>(0xD2511F53u) * counter.word[0];
        const uint64_t high = static_cast<uint64_t>(0xCD9E8D57u) * counter.word[2];
        counter = {{static_cast<uint32_t>(high >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(high),
                    static_cast<uint32_t>(low >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(low)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}
