# The smallest program that needs a kernel with 32-bit emulation: exit(0).
.globl _start
_start:
    movl $1, %eax
    xorl %ebx, %ebx
    int $0x80
