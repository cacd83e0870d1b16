/* kvfs._native: the module. What its functions and types promise is in kvfs/_native.pyi. */
#include "pyutil.h"

#include "summary.h"
#include "table.h"

enum { ABI_VERSION = 1 };

static int exec_module(PyObject *module)
{
    if (PyModule_AddIntConstant(module, "RECORD_BYTES", KVFS_RECORD_BYTES) != 0 ||
        PyModule_AddIntConstant(module, "ENTRY_BYTES", KVFS_ENTRY_BYTES) != 0 ||
        PyModule_AddIntConstant(module, "ABI_VERSION", ABI_VERSION) != 0)
        return -1;
    if (PyModule_AddFunctions(module, kvfs_batch_methods) != 0 ||
        PyModule_AddFunctions(module, kvfs_misc_methods) != 0)
        return -1;
    bool done = kvfs_add_index(module) && kvfs_add_ring(module) && kvfs_add_mapping(module) &&
                kvfs_add_arena(module) && kvfs_add_lease_page(module) &&
                kvfs_add_activity(module);
    return done ? 0 : -1;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)exec_module},
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "kvfs._native",
    .m_doc = "Native core of kvfs: copies, checksums, index, views.",
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void);

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
