/* What the files share that make the batch functions of the module: batch_py.c, summary_py.c.
 *
 * All need the GIL. */
#ifndef KVFS_BATCH_PY_H
#define KVFS_BATCH_PY_H

#include "pyutil.h"

/* Take an argument of exactly count items of item_bytes; NULL with an exception set. */
static inline void *take(struct kvfs_views *views, PyObject *object, const char *name,
                         size_t item_bytes, size_t count, bool is_writable)
{
    Py_buffer *view = kvfs_take(views, object, is_writable);
    if (view == NULL || !kvfs_check_items(view, name, item_bytes, count))
        return NULL;
    return view->buf;
}

/* Take the argument that says how many items the batch has. */
static inline void *take_first(struct kvfs_views *views, PyObject *object, const char *name,
                               size_t item_bytes, size_t *count, bool is_writable)
{
    Py_buffer *view = kvfs_take(views, object, is_writable);
    if (view == NULL || !kvfs_count_items(view, name, item_bytes, count))
        return NULL;
    return view->buf;
}

/* Of summary_py.c, listed in kvfs_batch_methods. */
PyObject *py_sign_entries(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_place_payloads(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_fill_entries(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_entry_records(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_pack_summary(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_scan_entries(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_distinct_keys(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_find_keys(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_closure(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_tally(PyObject *module, PyObject *args, PyObject *kwargs);

#endif
