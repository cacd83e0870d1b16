/* Helpers of the Python layer: arguments, errors, objects that can be closed.
 *
 * All functions need the GIL. Those that return bool set a Python exception when it is false. */
#ifndef KVFS_PYUTIL_H
#define KVFS_PYUTIL_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>

enum { KVFS_VIEWS_MAX = 6 };

/* Buffers held for the time of one call. Start with {0}; kvfs_release() when done, always. */
struct kvfs_views {
    Py_buffer views[KVFS_VIEWS_MAX];
    int count;
};

/* Take a C-contiguous buffer; returns its view, or NULL with an exception set. */
Py_buffer *kvfs_take(struct kvfs_views *views, PyObject *object, bool is_writable);

void kvfs_release(struct kvfs_views *views);

/* ValueError unless the view holds whole items of item_bytes; sets *count. */
bool kvfs_count_items(const Py_buffer *view, const char *name, size_t item_bytes, size_t *count);

/* ValueError unless the view holds exactly count items. */
bool kvfs_check_items(const Py_buffer *view, const char *name, size_t item_bytes, size_t count);

/* An integer in [minimum, maximum], else ValueError (TypeError for no integer). */
bool kvfs_parse_u64(PyObject *object, const char *name, uint64_t minimum, uint64_t maximum,
                    uint64_t *value);

/* Raise what belongs to a negative errno; always returns NULL. */
PyObject *kvfs_raise(int status);

/* Put the SIGBUS handler in place, else OSError. */
bool kvfs_need_guard(void);

/* Life of an object whose methods release the GIL: close() ends it for new calls at once and
 * frees it when the last running call returns. All under the GIL. */
struct kvfs_life {
    bool is_open;
    unsigned users;
};

/* Begin a call; ValueError if closed. */
bool kvfs_enter(struct kvfs_life *life, const char *what);

/* End a call; returns true if the caller must free the resources now. */
bool kvfs_leave(struct kvfs_life *life);

/* Close; returns true if the caller must free the resources now. Idempotent. */
bool kvfs_shut(struct kvfs_life *life);

/* Make a type of a specification and add it to a module. */
bool kvfs_add_type(PyObject *module, PyType_Spec *spec);

/* Allocate an instance of a heap type, zeroed. */
PyObject *kvfs_alloc(PyTypeObject *type);

/* Finish opening an instance: begin its life, or drop it and raise what `status` means. `reason`
 * (or NULL) says why a descriptor is not `what`. */
PyObject *kvfs_opened(PyObject *self, struct kvfs_life *life, int status, const char *what,
                      const char *reason);

/* Free an instance of a heap type. */
void kvfs_free(PyObject *self);

/* The types, added to the module; each returns false with an exception set. */
bool kvfs_add_index(PyObject *module);
bool kvfs_add_ring(PyObject *module);
bool kvfs_add_mapping(PyObject *module);
bool kvfs_add_arena(PyObject *module);
bool kvfs_add_lease_page(PyObject *module);
bool kvfs_add_activity(PyObject *module);

/* Functions, NULL-terminated. */
extern PyMethodDef kvfs_batch_methods[];
extern PyMethodDef kvfs_misc_methods[];

#endif
