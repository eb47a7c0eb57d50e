module poolserver

go 1.24
