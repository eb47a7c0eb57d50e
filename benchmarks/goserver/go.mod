module benchserver

go 1.24
