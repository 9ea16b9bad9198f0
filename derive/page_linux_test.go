package derive

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Both kinds of page: the fallback is tested where the kernel does not need it too.
func eachKind(t *testing.T, f func(t *testing.T, newPage func() *os.File)) {
	for kind, make := range map[string]func() (*os.File, error){PageSecret: NewPage, PageMemfd: newMemfdPage} {
		t.Run(kind, func(t *testing.T) {
			newPage := func() *os.File {
				page, err := make()
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = page.Close() })
				return page
			}
			if got, err := PageKind(newPage()); err != nil {
				t.Fatal(err)
			} else if got != kind {
				t.Skipf("this kernel makes pages of kind %s: boot Linux 6.5 or newer, or with secretmem.enable=1", got)
			}
			f(t, newPage)
		})
	}
}

func mappedPage(t *testing.T, f *os.File) []byte {
	t.Helper()
	page, err := mapPage(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(page) })
	return page
}

func TestPage(t *testing.T) {
	eachKind(t, func(t *testing.T, newPage func() *os.File) {
		f := newPage()
		if _, _, err := parsePage(mappedPage(t, f)); !errors.Is(err, ErrEmptyPage) {
			t.Errorf("a new page: %v", err)
		}
		masters := []Master{testMaster(t, 0), testMaster(t, 1), testMaster(t, 2)}
		if err := FillPage(f, masters); err != nil {
			t.Fatal(err)
		}
		page := mappedPage(t, f)
		realm, prks, err := parsePage(page)
		if err != nil || len(prks) != 3 {
			t.Fatalf("%d generations, %v", len(prks), err)
		}
		if want := testSchedule(t, 0).RealmID(); realm != want {
			t.Errorf("realm id %s, want %s", realm, want)
		}
		for i, m := range masters {
			want, _ := testSchedule(t, byte(i)).prk.octets()
			wantOctets(t, "PRK", prks[i], want)
			if bytes.Contains(page, octetsOf(t, m)) {
				t.Error("the page has a master")
			}
		}
	})
}

func TestPageIsFilledOnce(t *testing.T) {
	eachKind(t, func(t *testing.T, newPage func() *os.File) {
		f := newPage()
		for what, masters := range map[string][]Master{
			"no master":     nil,
			"a zero master": {testMaster(t, 0), {}},
			"too many":      make([]Master, MaxGenerations+1),
		} {
			if FillPage(f, masters) == nil {
				t.Errorf("%s was accepted", what)
			}
		}
		if err := FillPage(f, []Master{testMaster(t, 0)}); err != nil {
			t.Fatalf("after refusals: %v", err)
		}
		before := bytes.Clone(mappedPage(t, f))
		if err := FillPage(f, []Master{testMaster(t, 1)}); !errors.Is(err, ErrPageFilled) {
			t.Errorf("filled again: %v", err)
		}
		if !bytes.Equal(before, mappedPage(t, f)) {
			t.Error("the second filling changed the page")
		}
	})
}

func TestPageHoldsAllGenerations(t *testing.T) {
	var masters []Master
	for range MaxGenerations {
		masters = append(masters, RandomMaster())
	}
	f := testPage(t, masters...)
	if _, prks, err := parsePage(mappedPage(t, f)); err != nil || len(prks) != MaxGenerations {
		t.Errorf("%d generations, %v", len(prks), err)
	}
}

// Who has the page mapped must not be killed by one who shortens it.
func TestPageKeepsItsSize(t *testing.T) {
	eachKind(t, func(t *testing.T, newPage func() *os.File) {
		f := newPage()
		for _, size := range []int64{0, 100, 2 * pageSize} {
			if f.Truncate(size) == nil {
				t.Errorf("the page was resized to %d", size)
			}
		}
	})
}

func TestMemfdPageIsSealed(t *testing.T) {
	f, err := newMemfdPage()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := FillPage(f, []Master{testMaster(t, 0)}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("x"), 0); err == nil {
		t.Error("a filled page can be written")
	}
}

func TestForeignDescriptors(t *testing.T) {
	regular, err := os.Create(filepath.Join(t.TempDir(), "page"))
	if err != nil {
		t.Fatal(err)
	}
	defer regular.Close()
	if err := regular.Truncate(pageSize); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	closed, _ := os.CreateTemp(t.TempDir(), "")
	_ = closed.Close()
	for what, f := range map[string]*os.File{
		"a file":            regular,
		"a pipe":            r,
		"a closed file":     closed,
		"a memfd, unsealed": memfd(t, pageSize, 0),
		"a memfd, shorter":  memfd(t, 100, sizeSeals),
		"a memfd, empty":    memfd(t, 0, sizeSeals),
	} {
		if kind, err := PageKind(f); !errors.Is(err, ErrForeignPage) || kind != "" {
			t.Errorf("%s: kind %q, %v", what, kind, err)
		}
		if err := FillPage(f, []Master{testMaster(t, 0)}); !errors.Is(err, ErrForeignPage) {
			t.Errorf("filling %s: %v", what, err)
		}
	}
}

func memfd(t *testing.T, size int64, seals int) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("other", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "other")
	t.Cleanup(func() { _ = f.Close() })
	if err := errors.Join(f.Truncate(size), addSeals(fd, seals)); err != nil {
		t.Fatal(err)
	}
	return f
}
